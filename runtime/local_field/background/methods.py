"""The methods that remove a background field, by name."""

from qsm_deploy.runtime.local_field.background.lbv import Lbv
from qsm_deploy.runtime.local_field.background.names import REMOVAL_NAMES
from qsm_deploy.runtime.local_field.background.pdf import Pdf
from qsm_deploy.runtime.local_field.background.removal import BackgroundRemoval
from qsm_deploy.runtime.local_field.background.spheres import Resharp, VSharp
from qsm_deploy.runtime.local_field.background.two_prior import TwoPrior

METHODS: tuple[BackgroundRemoval, ...] = (TwoPrior(), Pdf(), Resharp(), VSharp(), Lbv())
REMOVALS = dict(zip(REMOVAL_NAMES, METHODS, strict=True))
DEFAULT = REMOVAL_NAMES[0]
