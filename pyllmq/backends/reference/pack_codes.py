"""pack_codes and unpack_codes, as formats/codes.py defines them."""

from ...formats.codes import pack_codes, unpack_codes
from ...operations import PACK_CODES, UNPACK_CODES, anything
from .rows import BECAUSE, ORDER

PACK_CODES.register("reference.pack_codes", ORDER, anything, pack_codes, BECAUSE)
UNPACK_CODES.register("reference.unpack_codes", ORDER, anything, unpack_codes, BECAUSE)
