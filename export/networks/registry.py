"""The networks that can be exported."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from qsm_deploy.export.networks.network_spec import NetworkSpec, Weights
from qsm_deploy.kernels.errors import UsageError
from qsm_deploy.runtime.card.card import UNITS

OWN_LICENCE = "as qsm-deploy"
FIELD, TOTAL = ("local_field_ppm",), ("total_field_ppm",)
FIELD_MASK = (*FIELD, "mask")
MAPS = (*FIELD, "chi_ppm", "r2prime_hz", "mask")
PHASE = ("phase_rad", "mask", "echo_time_s", "field_strength_t")
FIELD_GEOMETRY = (*FIELD_MASK, "voxel_size_mm", "b0_direction")
FORM = ("unrolled", "split")
DIPOLE_OP = ("matmul", "function", "plugin")
IN_THE_GRAPH = {"dipole_op": ("form", "unrolled")}
IQSM_MARKS = (
    "EncodeConvs.0.EncodeConv.0.weight",
    "EncodeConvs.3.EncodeConv.0.weight",
    "FinalConv.weight",
)
QSMNET_MARKS = ("conv11.conv.weight", "l_conv1.conv.weight")
OF_IQFM = frozenset({"iqfm", "lfs"})

SPECS = (
    NetworkSpec(
        name="ir2qsm",
        module="ir2qsm",
        inputs=FIELD,
        parameters=10_050_553,
        divisor=8,
        gmac_64=150.90,
        marks=("iteration0_middle.out_gate.conv.0.bias",),
        published=Weights(
            "https://drive.google.com/file/d/1EGZGxdgVWI8r0RlyfjP-xQyOL88vLeDf (model_IR2Unet.pth)",
            "none declared",
        ),
        doi="10.1002/mp.17747",
        options={"residual": ("input", "iteration")},
        bundled=(
            "ir2qsm-demo.safetensors",
            Weights("a half-width demo trained by examples/train.py", OWN_LICENCE),
        ),
    ),
    NetworkSpec(
        name="tv-unet",
        module="tv_unet",
        inputs=(
            *FIELD,
            "tv_chi_ppm",
            "tv_field_ppm",
            "tv_residual_ppm",
            "residual_tkd_ppm",
            "residual_iterated_tkd_ppm",
            "field_iterated_tkd_ppm",
            "mask",
            "field_noise_ppm",
        ),
        parameters=598_475,
        divisor=4,
        gmac_64=7.68,
        marks=("stem.weight", "linear.weight"),
        published=Weights("examples/train.py, which trains them", OWN_LICENCE),
        bundled=(
            "tv-unet.safetensors",
            Weights("trained by examples/train.py", OWN_LICENCE),
        ),
    ),
    NetworkSpec(
        name="loopnet",
        module="loopnet",
        inputs=FIELD,
        parameters=6_336_097,
        divisor=16,
        gmac_64=75.85,
        marks=("e1.0.0.weight", "d1.0.0.weight"),
        published=Weights("nowhere: a reconstruction from the abstract, see docs/loopnet.md", "-"),
    ),
    NetworkSpec(
        name="xqsm",
        module="xqsm",
        inputs=FIELD,
        parameters=5_215_681,
        divisor=8,
        gmac_64=103.95,
        marks=("InputOct.EncodeConv1.convHH.weight",),
        published=Weights(
            "https://github.com/sunhongfu/xQSM/releases (v1.0-demo, xQSM_invivo.pth)", "GPL-3.0"
        ),
        doi="10.1002/nbm.4461",
    ),
    NetworkSpec(
        name="xqsm-unet",
        module="xqsm_unet",
        inputs=FIELD,
        parameters=4_150_785,
        divisor=4,
        gmac_64=183.27,
        marks=("EncodeConvs.0.EncodeConv.0.weight", "FinalConv.weight"),
        published=Weights(
            "https://github.com/sunhongfu/xQSM/releases (v1.0-demo, Unet_invivo.pth)", "GPL-3.0"
        ),
        doi="10.1002/nbm.4461",
    ),
    NetworkSpec(
        name="qsmnet",
        module="qsmnet",
        inputs=FIELD_MASK,
        parameters=99_453_985,
        divisor=16,
        gmac_64=271.55,
        marks=("qsmnet/conv11/conv_weights",),
        published=Weights(
            "https://drive.google.com/file/d/1kyRKSPN78i1npIaFvJJJgmB84v-N106m (QSMnet_64); "
            "convert as docs/qsmnet-weights.md says",
            "SNU academic",
        ),
        doi="10.1016/j.neuroimage.2018.06.030",
    ),
    NetworkSpec(
        name="qsmnet-plus",
        module="qsmnet",
        inputs=FIELD_MASK,
        parameters=99_453_985,
        divisor=16,
        gmac_64=271.55,
        marks=("qsmnet/conv11/conv_weights",),
        published=Weights(
            "https://drive.google.com/file/d/1ee5nI-MMySImX2tM4m71szcjFow4DD5g (QSMnet+_64); "
            "convert as docs/qsmnet-weights.md says",
            "SNU academic",
        ),
        doi="10.1016/j.neuroimage.2020.116619",
    ),
    NetworkSpec(
        name="qsmnet-torch",
        module="qsmnet",
        inputs=FIELD_MASK,
        parameters=22_581_217,
        divisor=16,
        gmac_64=59.45,
        marks=QSMNET_MARKS,
        published=Weights("https://github.com/minjoony/qsmnet_torch (*.pth.tar)", "none declared"),
        doi="10.1016/j.neuroimage.2018.06.030",
    ),
    NetworkSpec(
        name="lpcnn",
        module="lpcnn",
        inputs=FIELD_GEOMETRY,
        parameters=446_337,
        divisor=1,
        gmac_64=350.21,
        marks=("gen.0.weight", "alpha"),
        published=Weights(
            "https://github.com/Sulam-Group/LPCNN (checkpoints, *Bmodel.pkl)", "none declared"
        ),
        doi="10.1007/978-3-030-59713-9_13",
        options={"form": FORM, "orientations": ("1", "2", "3"), "dipole_op": DIPOLE_OP},
        only_with=IN_THE_GRAPH,
    ),
    NetworkSpec(
        name="modl-qsm",
        module="modl_qsm",
        inputs=FIELD_GEOMETRY,
        parameters=447_235,
        divisor=1,
        gmac_64=350.91,
        marks=("model_1/conv3d_1/kernel:0", "my_layer_1/my_layer_1/step:0"),
        published=Weights(
            "https://github.com/Ruimin-Feng/MoDL-QSM (logs/last.h5)", "none declared"
        ),
        doi="10.1016/j.neuroimage.2021.118376",
        options={"form": FORM, "dipole_op": DIPOLE_OP},
        only_with=IN_THE_GRAPH,
    ),
    NetworkSpec(
        name="spinet-qsm",
        module="spinet_qsm",
        inputs=("prior_input",),
        output="prior_output",
        parameters=447_234,
        divisor=1,
        gmac_64=116.97,
        marks=("gen.0.weight", "lambda_val"),
        published=Weights(
            "https://github.com/venkateshvaddadi/SpiNet-QSM (savedModels/model_weights.pth)",
            "none declared",
        ),
        doi="10.1007/s10334-024-01158-7",
    ),
    NetworkSpec(
        name="iqsm",
        module="iqsm",
        inputs=PHASE,
        parameters=4_305_409,
        divisor=16,
        gmac_64=15.85,
        marks=IQSM_MARKS,
        published=Weights(
            "https://huggingface.co/sunhongfu/iQSM (a U-net file and a LoT file)", "none declared"
        ),
        doi="10.1016/j.neuroimage.2022.119410",
        foreign_words=OF_IQFM,
    ),
    NetworkSpec(
        name="iqfm",
        module="iqfm",
        inputs=PHASE,
        output="local_field_ppm",
        parameters=4_305_409,
        divisor=16,
        gmac_64=15.85,
        marks=IQSM_MARKS,
        published=Weights(
            "https://huggingface.co/sunhongfu/iQSM (iQFM_40_v2.pth and LoTLayer_lfs_40_v2.pth)",
            "none declared",
        ),
        doi="10.1016/j.neuroimage.2022.119410",
        foreign_words=frozenset({"iqsm", "chi"}),
    ),
    NetworkSpec(
        name="iqsm-plus",
        module="iqsm_plus",
        inputs=PHASE,
        parameters=4_347_780,
        divisor=16,
        gmac_64=17.66,
        marks=("Z_embed.0.weight", "ini_embd_layer.EncodeConv.0.weight"),
        published=Weights(
            "https://huggingface.co/sunhongfu/iQSM_Plus (a U-net file and a LoT file)",
            "none declared",
        ),
        doi="10.48550/arXiv.2311.07823",
        foreign_words=OF_IQFM,
    ),
    NetworkSpec(
        name="after-qsm",
        module="after_qsm",
        inputs=FIELD,
        parameters=8_830_098,
        divisor=16,
        gmac_64=848.63,
        marks=("recon_model_state._output.weight", "refine_model_state.output.weight"),
        published=Weights(
            "https://github.com/TreeceSheon/AFTER-QSM (AFTER-QSM.pkl)", "none declared"
        ),
        doi="10.48550/arXiv.2211.13942",
        options={"part": ("recon", "refine")},
    ),
    NetworkSpec(
        name="bfrnet",
        module="bfrnet",
        inputs=TOTAL,
        output="local_field_ppm",
        parameters=19_822_273,
        divisor=8,
        gmac_64=318.27,
        marks=("Input-Conv-HH.weight", "Final-ConvolutionLayer.weight"),
        published=Weights(
            "https://www.dropbox.com/sh/q678oapc65evrfa/AADh2CGeUzhHh6q9t3Fe3fVVa "
            "(BFRnet_L2_64PS_24BS_45Epo_NewHCmix.mat); export it as docs/networks.md says",
            "GPL-3.0",
        ),
        doi="10.1016/j.zemedi.2022.08.001",
        onnx_weights=True,
    ),
    NetworkSpec(
        name="qsmgan",
        module="qsmgan",
        inputs=FIELD,
        parameters=2_686_803,
        divisor=16,
        gmac_64=11.91,
        marks=("down_sample_layers.0.layers.0.weight", "conv2.1.weight"),
        published=Weights(
            "https://github.com/mmorri10/QSMGAN-LupoLab "
            "(net_best.pt and config.json in WGAN_i64o48.zip)",
            "MIT",
        ),
        doi="10.1016/j.neuroimage.2019.116389",
    ),
    NetworkSpec(
        name="autoqsm",
        module="autoqsm",
        inputs=TOTAL,
        parameters=1_400_561,
        divisor=8,
        gmac_64=14.06,
        marks=("model_weights/conv3d_transpose_1/conv3d_transpose_1/kernel:0",),
        published=Weights(
            "https://github.com/AMRI-Lab/AutoQSM (models/vnet/model_final_1.hdf5)",
            "none declared",
        ),
        doi="10.1016/j.neuroimage.2019.116064",
    ),
    NetworkSpec(
        name="nextqsm",
        module="nextqsm",
        inputs=TOTAL,
        output="local_field_ppm",
        parameters=38_907_362,
        divisor=64,
        gmac_64=8.88,
        marks=("encoder/cnn/layers/conv3d/vars/0", "last_conv/layers/conv3d/vars/0"),
        published=Weights(
            "https://osf.io/zqfdc (nextqsm-weights.tar: two .weights.h5 and the lambdas.npy)",
            "none declared",
        ),
        doi="10.1016/j.media.2022.102700",
        options={"part": ("bf", "vn")},
    ),
    NetworkSpec(
        name="chi-sepnet",
        module="chi_sepnet",
        inputs=MAPS,
        output="chi_positive_ppm",
        further_outputs=("chi_negative_ppm",),
        parameters=22_582_978,
        divisor=16,
        gmac_64=59.91,
        marks=QSMNET_MARKS,
        published=Weights(
            "https://github.com/SNU-LIST/chi_sepnet (xsepnet.pth.tar)", "SNU academic"
        ),
        doi="10.1002/hbm.70136",
    ),
    NetworkSpec(
        name="susep-net",
        module="susep_net",
        inputs=MAPS,
        output="chi_positive_ppm",
        further_outputs=("chi_negative_ppm",),
        parameters=51_434_754,
        divisor=8,
        gmac_64=263.82,
        marks=("Unet_encoder.enc1.conv.0.weight", "QSM_encoder.fc_pos.0.conv.0.weight"),
        published=Weights(
            "https://drive.google.com/drive/folders/1oxgbs4BJ7m3tl2Z_GPj4BwdKxZLyywVP "
            "(SUSEPNet.pth and norm/all_mean_std.mat)",
            "none declared",
        ),
        doi="10.48550/arXiv.2506.13293",
    ),
)
REGISTRY = {spec.name: spec for spec in SPECS}  # those of this package
GROUP = "qsm_deploy.networks"  # of entry points, with which other packages add theirs


@dataclass(frozen=True)
class Additions:
    """What other packages add: networks by name, and why those that are refused are."""

    specs: Mapping[str, NetworkSpec]
    refused: Mapping[str, str]


@functools.cache
def additions() -> Additions:
    """Return the networks of the entry points that are installed."""
    specs: dict[str, NetworkSpec] = {}
    refused: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        try:
            spec = entry.load()
        except Exception as error:  # of somebody's package: whatever it raises
            lines = str(error).strip().splitlines() or [""]
            refused[entry.name] = f"{entry.value}: {type(error).__name__}: {lines[0]}"
            continue
        if not isinstance(spec, NetworkSpec):
            refused[entry.name] = f"{entry.value} is no NetworkSpec, but a {type(spec).__name__}"
        elif spec.output not in UNITS:
            refused[entry.name] = f"{entry.value}: its output {spec.output} is none that is known"
        elif spec.name in REGISTRY or spec.name in specs:
            refused[entry.name] = f"{entry.value}: a network is called {spec.name} already"
        else:
            specs[spec.name] = spec
    return Additions(specs, refused)


def known_networks() -> Mapping[str, NetworkSpec]:
    """Return the networks of this package, and those that others add."""
    return {**REGISTRY, **additions().specs}


def network_spec(name: str) -> NetworkSpec:
    """Return the network of that name.

    Raises
    ------
    UsageError
        If there is none, or an entry point of that name was refused; the message says why.
    """
    known = known_networks()
    if name in known:
        return known[name]
    if name in (refused := additions().refused):
        raise UsageError(
            f"--model {name}: its entry point cannot be used ({refused[name]}); mend or uninstall "
            "that package"
        )
    raise UsageError(f"--model {name}: no such network; known are {', '.join(known)}")


def recognise(keys: Collection[str]) -> tuple[NetworkSpec, ...]:
    """Return the networks that a checkpoint's keys look like, none if they look like no other.

    The most telling marks win; networks that share a format come together.
    """
    names = {key.removeprefix("Unet.") for key in keys}
    fitting = [s for s in known_networks().values() if s.marks and names.issuperset(s.marks)]
    most = max((len(spec.marks) for spec in fitting), default=0)
    first = next((spec for spec in fitting if len(spec.marks) == most), None)
    return tuple(spec for spec in fitting if first and spec.marks == first.marks)
