"""What may be asked of ``--cluster``, and who gets to speak with a scheduler."""

import datetime
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.runtime.cohort.dask import conftest
from tests.runtime.cohort.test_children import NAMES, OURS, maps_of

TLS = "tls://10.0.0.1:8786 --cluster-tls a b c"


def issue(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Write an authority's certificate, one that it signed, and the key of that."""
    folder.mkdir(exist_ok=True)
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("authority", "own")}
    titles = {
        who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {who}")]) for who in keys
    }
    now = datetime.datetime.now(datetime.timezone.utc)
    paths = tuple(folder / f"{name}-{kind}.pem" for kind in ("ca", "cert", "key"))
    for path, who in zip(paths, keys, strict=False):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(titles[who])
            .issuer_name(titles["authority"])
            .public_key(keys[who].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(who == "authority", None), critical=True)
            .sign(keys["authority"], hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    key = keys["own"].private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    paths[2].write_bytes(key)
    return paths


@pytest.mark.slow
def test_tls_lets_in_who_has_a_certificate_of_the_authority(
    new_dataset, new_dask, tmp_path
) -> None:
    root = new_dataset(*NAMES[:2])
    ca, cert, key = issue(tmp_path, "ours")
    dask = new_dask("--tls-ca-file", str(ca), "--tls-cert", str(cert), "--tls-key", str(key))
    dask.start("tls")
    dask.add_worker()
    words = ("--bids", root, "--method", "tkd", "--cluster")
    plain = dask.address.replace("tls://", "tcp://")
    theirs = issue(tmp_path, "theirs")
    for refused in ((plain,), (dask.address, "--cluster-tls", *theirs)):
        code, out, err = conftest.run(*words, *refused)
        assert (code, out) == (4, ""), err
        assert f"no scheduler answers at {refused[0]} (" in err
        assert len(err.splitlines()) == 1
    code, _, err = conftest.run(*words, dask.address, "--cluster-tls", ca, cert, key)
    assert code == 0, err
    assert maps_of(root / OURS).keys() == {*NAMES[:2]}


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ("tcp://10.0.0.1:8786", "without TLS whoever reaches the port runs programs"),
        ("tcp://head:8786", "pass --cluster-insecure"),
        ("tcp://127.0.0.1.example.org:8786", "pass --cluster-insecure"),
        ("tls://10.0.0.1:8786", "belong together"),
        ("tcp://127.0.0.1:8786 --cluster-tls a b c", "belong together"),
        (TLS, "--cluster-tls: a is no file"),
        (f"{TLS} --cluster-config x.toml", "--cluster-config is of --cluster slurm"),
        ("tcp://127.0.0.1", "expected local:N, slurm, or the address"),
        ("tcp://127.0.0.1:port", "expected local:N, slurm, or the address"),
        ("127.0.0.1:8786", "expected local:N, slurm, or the address"),
        ("slurm", "needs --cluster-config FILE.toml"),
    ],
)
def test_what_is_not_asked_of_anybody(new_dataset, run, cluster, said) -> None:
    code, out, err = run("--bids", new_dataset("sub-01"), "--cluster", *cluster.split())
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("flag", ["--cluster-config x.toml", "--cluster-insecure"])
def test_flags_of_a_cluster_need_one(new_dataset, run, flag) -> None:
    code, _, err = run("--bids", new_dataset("sub-01"), *flag.split())
    assert (code, f"{flag.split()[0]} needs --cluster" in err) == (2, True)


def test_the_extra_is_named_where_it_is_not_installed(new_dataset, run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "qsm_deploy.runtime.cohort.dask.pool", raising=False)
    monkeypatch.delitem(sys.modules, "qsm_deploy.runtime.cohort.dask.workplace", raising=False)
    code, _, err = run("--bids", new_dataset("sub-01"), "--cluster", "tcp://127.0.0.1:8786")
    assert code == 4
    assert "needs distributed, which is not installed" in err
    assert "'.[cluster]'" in err
