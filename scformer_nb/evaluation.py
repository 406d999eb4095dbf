"""The old name of `metrics`, `plots` and `ledger`, for the pages that still ask for it."""
from .ledger import *  # noqa
from .metrics import *  # noqa
from .metrics import check_embedding as _check_embedding  # noqa
from .plots import *  # noqa
from .plots import palette as _palette  # noqa
