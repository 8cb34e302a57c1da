"""Send NIfTI volumes to a running qsm-serve as a scanner would, and write what comes back.

    qsm-serve &
    qsm-phantom head --shape 96 112 96 --voxel-size 1.6 1.6 1.6
    python examples/mrd_client.py dipole head/field.nii.gz -m head/mask.nii.gz --units ppm -o back
    python examples/mrd_client.py qsm --phase e1_phase.nii e2_phase.nii --magnitude e1.nii e2.nii \
           --echo-times 0.005 0.010 --field-strength 3 -o back

The volumes are cut into slices, sent in interleaved order, and put together again by the
positions in the headers of the images that come back.
"""

import argparse
import json
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ismrmrd
import nibabel as nib
import numpy as np
from ismrmrd.serialization import ConfigFile, ProtocolDeserializer, ProtocolSerializer

MAGNITUDE, PHASE, REAL = 1, 2, 3
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def slices(
    volume: np.ndarray,
    affine: np.ndarray,
    image_type: int,
    series: int,
    echo: int,
    **attributes: str,
) -> Iterator[ismrmrd.Image]:
    """Cut a NIfTI volume into images, every second slice first, as scanners acquire them."""
    lps = LPS_FROM_RAS @ affine
    voxel_mm = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / voxel_mm
    nx, ny, nz = volume.shape
    for k in (*range(0, nz, 2), *range(1, nz, 2)):
        image = ismrmrd.Image.from_array(np.ascontiguousarray(volume[:, :, k].T))
        centre = lps @ [(nx - 1) / 2, (ny - 1) / 2, k, 1]
        image.field_of_view[:] = (nx * voxel_mm[0], ny * voxel_mm[1], voxel_mm[2])
        image.position[:] = centre[:3]
        image.read_dir[:], image.phase_dir[:], image.slice_dir[:] = directions.T
        image.image_type, image.image_series_index = image_type, series
        image.contrast, image.slice, image.image_index = echo, k, k + 1
        image.meta = ismrmrd.Meta(attributes)
        yield image


def header(echo_times_s: Iterable[float], field_strength_t: float | None) -> Any:
    """Return an ISMRMRD header with what the server reads; a frequency of 0 is not known."""
    xsd = ismrmrd.xsd
    return xsd.ismrmrdHeader(
        experimentalConditions=xsd.experimentalConditionsType(
            H1resonanceFrequency_Hz=round(42.577e6 * (field_strength_t or 0))
        ),
        sequenceParameters=xsd.sequenceParametersType(TE=[1000 * t for t in echo_times_s]),
    )


def volumes(images: list[ismrmrd.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Return the (x, y, z) susceptibility of one series [ppb], and its NIfTI affine."""
    first = images[0]
    normal = np.array(first.slice_dir)
    images.sort(key=lambda image: float(normal @ np.array(image.position)))
    scale, offset = float(first.meta["RescaleSlope"]), float(first.meta["RescaleIntercept"])
    pixels = np.concatenate([image.data[0] for image in images]).transpose(2, 1, 0)
    nx, ny, _ = pixels.shape
    step = (np.array(images[-1].position) - np.array(first.position)) / max(len(images) - 1, 1)
    lps = np.eye(4)
    lps[:3, 0] = np.array(first.read_dir) * first.field_of_view[0] / nx
    lps[:3, 1] = np.array(first.phase_dir) * first.field_of_view[1] / ny
    lps[:3, 2] = step
    lps[:3, 3] = np.array(first.position) - lps[:3, :3] @ [(nx - 1) / 2, (ny - 1) / 2, 0]
    return (pixels * scale + offset).astype(np.float32), LPS_FROM_RAS @ lps


def converse(
    address: tuple[str, int], config: str, start: Any, parameters: dict, images: list
) -> Iterator[ismrmrd.Image]:
    """Send a session and yield the images of the answer; texts go to stderr."""
    try:
        connection = socket.create_connection(address)
    except OSError as error:
        sys.exit(f"no server on {address[0]}:{address[1]} ({error.strerror}); start qsm-serve")
    with connection, connection.makefile("rwb") as stream:

        def send() -> None:
            with ProtocolSerializer(stream) as out:
                for message in (ConfigFile(config), start, json.dumps({"parameters": parameters})):
                    out.serialize(message)
                for image in images:
                    out.serialize(image)

        # scanners send and take at the same time
        sender = threading.Thread(target=send)
        sender.start()
        for message in ProtocolDeserializer(stream).deserialize():
            if isinstance(message, str):
                print(message.rstrip("\0"), file=sys.stderr)
            else:
                yield message
        sender.join()


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume and its affine: whole numbers as such, everything else as float32."""
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    if data.ndim != 3:
        sys.exit(f"{path} is {data.ndim}-D; pass one 3-D volume for each echo")
    if data.dtype.kind in "iu":
        return data.astype(np.uint16 if data.min() >= 0 else np.int16), image.affine
    return data.astype(np.float32), image.affine


def main() -> None:
    """Send, receive, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", choices=("qsm", "dipole"))
    add("field", nargs="?", type=Path, help="local field, for dipole")
    add("--phase", nargs="+", type=Path, default=[], help="one volume for each echo, for qsm")
    add("--magnitude", nargs="+", type=Path, default=[], help="likewise")
    add("-m", "--mask", type=Path)
    add("--units", help="of the local field: ppm, ppb, hz or rad")
    add("--echo-times", nargs="+", type=float, default=[], metavar="S")
    add("--field-strength", type=float, metavar="T")
    add("--parameter", action="append", default=[], metavar="NAME=VALUE", help="any other")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=9002)
    add("-o", "--output", type=Path, default=Path("."), help="folder for the maps")
    args = parser.parse_args()

    images: list[ismrmrd.Image] = []
    for series, (kind, paths) in enumerate(((MAGNITUDE, args.magnitude), (PHASE, args.phase)), 1):
        for echo, path in enumerate(paths):
            images += slices(*load(path), kind, series, echo)
    if args.field is not None:
        images += slices(*load(args.field), REAL, 3, 0)
    if args.mask is not None:
        mask, affine = load(args.mask)
        images += slices((mask != 0).astype(np.uint16), affine, MAGNITUDE, 4, 0, ImageType="MASK")
    parameters = dict(item.split("=", 1) for item in args.parameter)
    if args.units:
        parameters["units"] = args.units
    start = header(args.echo_times, args.field_strength)
    sent = {image.image_series_index for image in images}
    series_back = defaultdict(list)
    for image in converse((args.host, args.port), args.config, start, parameters, images):
        series_back[image.image_series_index].append(image)
    args.output.mkdir(parents=True, exist_ok=True)
    for number in sorted(series_back.keys() - sent):
        data, affine = volumes(series_back[number])
        path = args.output / f"series{number}_chi_ppb.nii.gz"
        nib.save(nib.Nifti1Image(data, affine), path)
        print(path)
    if not series_back.keys() - sent:
        sys.exit("the server sent no map")


if __name__ == "__main__":
    main()
