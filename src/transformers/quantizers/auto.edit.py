from ..utils.quantization_config import Exl3Config
from .quantizer_exl3 import Exl3HfQuantizer


AUTO_QUANTIZER_MAPPING = {
    **...,
    "exl3": Exl3HfQuantizer,
}

AUTO_QUANTIZATION_CONFIG_MAPPING = {
    **...,
    "exl3": Exl3Config,
}

LOADING_ATTRIBUTES_CONFIG_TYPES = (
    ...,
    Exl3Config,
)
