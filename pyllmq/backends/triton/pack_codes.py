"""pack_codes and unpack_codes in plain torch: the first once, when a weight is made, the second never in a forward."""

from ...formats.codes import pack_codes, unpack_codes
from ...operations import PACK_CODES, UNPACK_CODES
from . import runtime
from .runtime import ORDER

because = "plain torch: once, when a weight is made"
PACK_CODES.register("triton.pack_codes", ORDER, runtime.on_device, pack_codes, because)
because = "plain torch: never in a forward"
UNPACK_CODES.register("triton.unpack_codes", ORDER, runtime.on_device, unpack_codes, because)
