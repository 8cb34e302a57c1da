"""The methods that remove a background field, by name."""

from qsm_deploy.runtime.local_field.background.lbv import Lbv
from qsm_deploy.runtime.local_field.background.pdf import Pdf
from qsm_deploy.runtime.local_field.background.removal import BackgroundRemoval
from qsm_deploy.runtime.local_field.background.spheres import Resharp, VSharp
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

DEFAULT = "two-prior"
REMOVALS: dict[str, BackgroundRemoval] = {
    "two-prior": TwoPrior(),
    "pdf": Pdf(),
    "resharp": Resharp(),
    "vsharp": VSharp(),
    "lbv": Lbv(),
}
