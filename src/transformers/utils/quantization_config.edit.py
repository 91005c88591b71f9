import difflib
import inspect
import numbers


class QuantizationMethod:
    ...
    EXL3 = "exl3"


class Exl3Config(QuantizationConfigMixin):
    """
    How a model is quantized to EXL3, the trellis-coded format of exllamav3, or was quantized by a converter.

    A checkpoint needs nothing from here to be decoded: its tensors say it all. What a converter wrote into its config is
    kept and written back.

    Args:
        bits (`float`, *optional*, defaults to 4.0):
            Average bits per weight of the quantized layers that `overrides` does not name, the head not counted, from 1
            to 8. An average that is no rate of the format (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8; halves with the mul1
            codebook only) is met by giving small layers higher rates than large ones. With a `dataset`, any average between 1 and 8
            is spent where errors count most, which is measured on it: `overrides={"*": 3}` gives all layers one rate.
        head_bits (`float`, *optional*):
            Bits per weight of the output embeddings: one of the rates, or 16 for not quantized. Unset, the head stays
            as it is when a model is quantized. A head that is tied to the input embeddings and quantized becomes a
            matrix of its own.
        codebook (`str`, *optional*, defaults to `"mul1"`):
            What states decode to: `"mul1"`, `"mcg"` or `"3inst"`. In checkpoints each layer has its own, whatever
            stands here.
        modules_to_not_convert (`list`, *optional*):
            Names or patterns of modules to leave as they are when a model is quantized, in addition to the default ones.
        overrides (`dict[str, float]`, *optional*):
            Rates for some layers: patterns for whole module names (`"*.down_proj"`, `"model.layers.0.*"`) to one of the
            rates, or 16 for not quantized. Of several that match, the last counts. Parts of fused projections and of
            experts may be called by their names in files, too. A pattern that matches no layer to be quantized is an
            error. The rate of the head is set by `head_bits` alone.
        embedding_bits (`int`, *optional*):
            Bits per element of the input embeddings, from 1 to 8, or 16 for not quantized. Unset, they stay as they are
            when a model is quantized. A head that is tied to them becomes a matrix of its own if `head_bits` is set.
            Otherwise it stays tied, is not saved, and is decoded from them when the model is loaded, into the float dtype.
        dataset (`str` or `list`, *optional*):
            Data to quantize with, so that outputs err less than without: texts, lists of token ids, or `"self"` for text that
            the model writes itself. Layers are quantized one after the other while the model reads it, and the whole float
            model has to fit in memory. The same data may give other bytes on another machine. It is not written to checkpoints.
        tokenizer (`str` or `PreTrainedTokenizerBase`, *optional*):
            For a `dataset` of texts, by default the model's.
        calibration_rows (`int`, *optional*, defaults to 16):
            How many windows of the `dataset` to read, at most.
        calibration_length (`int`, *optional*, defaults to 512):
            Tokens of a window. Texts are joined and cut into windows, and so are lists of token ids that are shorter than others.
        calibration_seed (`int`, *optional*, defaults to 0):
            Seed of the text that the model writes.
        effort (`str`, *optional*, defaults to `"default"`):
            How thoroughly a model is quantized: `"default"`, within 0.05 dB of the least error that the format allows,
            or `"fast"`, which takes up to half the time and has 0.1 to 0.5 dB more error (0.02 to 0.08 bits). It is not
            written to checkpoints.
        dequantize (`bool`, *optional*, defaults to `False`):
            Whether to load a quantized checkpoint as a plain model, with the weights that the quantized ones stand for.

    Attributes:
        converter_fields (`dict[str, Any]`):
            Other fields that a converter wrote (`version`, `calibration`, `out_scales`, ...), kept as they are. Only `from_dict`
            takes them; as arguments they are errors.

    Raises:
        `TypeError`: For an unknown argument. The message names those that there are.
    """

    def __init__(
        self,
        /,
        bits: float = 4.0,
        head_bits: float | None = None,
        codebook: str | None = "mul1",
        modules_to_not_convert: list | None = None,
        overrides: dict[str, float] | None = None,
        embedding_bits: int | None = None,
        dataset: str | list[str] | list[list[int]] | None = None,
        tokenizer: Any = None,
        calibration_rows: int = 16,
        calibration_length: int = 512,
        calibration_seed: int = 0,
        effort: str = "default",
        dequantize: bool = False,
        **kwargs,
    ):
        self._check_unknown(kwargs)
        self.quant_method = QuantizationMethod.EXL3
        self.bits = bits
        self.head_bits = head_bits
        self.embedding_bits = embedding_bits
        self.codebook = codebook
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = overrides
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.calibration_rows = calibration_rows
        self.calibration_length = calibration_length
        self.calibration_seed = calibration_seed
        self.effort = effort
        self.dequantize = dequantize
        self.converter_fields = {}
        self.post_init()

    def post_init(self):
        """Raises `ValueError` or `TypeError` for what the format does not have, naming the field."""
        rates = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
        for name in ("bits", "head_bits", "embedding_bits"):
            value = getattr(self, name)
            if value is None and name != "bits":
                continue
            if not self._is_number(value):
                raise TypeError(f"`{name}` of Exl3Config has to be a number, got {value!r}")
            setattr(self, name, self._written_number(value))
        if not 1 <= self.bits <= 8:
            raise ValueError(f"`bits` of Exl3Config has to be from 1 to 8, got {self.bits}")
        if self.head_bits not in (None, 16, *rates):
            raise ValueError(f"`head_bits` of Exl3Config has to be one of {rates}, 16 or None, got {self.head_bits}")
        if self.embedding_bits not in (None, 16, *range(1, 9)):
            raise ValueError(
                f"`embedding_bits` of Exl3Config has to be a whole number from 1 to 8, 16 or None, got {self.embedding_bits!r}"
            )
        self.embedding_bits = self.embedding_bits and int(self.embedding_bits)
        if self.codebook not in (None, "3inst", "mcg", "mul1"):
            raise ValueError(f"`codebook` of Exl3Config has to be `mul1`, `mcg` or `3inst`, got {self.codebook!r}")
        if self.effort not in ("default", "fast"):
            raise ValueError(f"`effort` of Exl3Config has to be `default` or `fast`, got {self.effort!r}")
        overrides = self.overrides
        is_pairs = isinstance(overrides, (list, tuple)) and all(isinstance(p, (list, tuple)) for p in overrides)
        if is_pairs and all(len(pair) == 2 and isinstance(pair[0], str) for pair in overrides):  # as they are written
            overrides = dict(overrides)
        if overrides is not None and not (isinstance(overrides, dict) and all(isinstance(n, str) for n in overrides)):
            raise TypeError(f"`overrides` of Exl3Config has to be a dict of patterns to rates, got {overrides!r}")
        for pattern, rate in (overrides or {}).items():
            if not self._is_number(rate) or rate not in (16, *rates):
                raise ValueError(
                    f"`overrides` of Exl3Config has to be one of {rates} or 16 for {pattern!r}, got {rate!r}"
                )
        if overrides is not None:
            self.overrides = {pattern: self._written_number(rate) for pattern, rate in overrides.items()}
        names = self.modules_to_not_convert
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
            raise TypeError(f"`modules_to_not_convert` of Exl3Config has to be a list of names, got {names!r}")
        if not isinstance(self.dequantize, bool):
            raise TypeError(f"`dequantize` of Exl3Config has to be True or False, got {self.dequantize!r}")
        self._check_data()

    def _check_data(self):
        for name, least in (("calibration_rows", 1), ("calibration_length", 2), ("calibration_seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` of Exl3Config has to be a whole number from {least} on, got {value!r}")
            if self.dataset is None and value != inspect.signature(type(self)).parameters[name].default:
                raise ValueError(
                    f"`{name}` of Exl3Config is for quantizing with data: pass a `dataset`, too, or leave it out."
                )
        if self.dataset is None or self.dataset == "self":
            if self.tokenizer is not None:
                raise ValueError("`tokenizer` of Exl3Config is for a `dataset` of texts. Pass both or none.")
            return
        if isinstance(self.dataset, str):
            raise ValueError(
                f"`dataset` of Exl3Config knows no names but `self`, got {self.dataset!r}: read the data, and pass a list of texts."
            )
        rows = self.dataset if isinstance(self.dataset, (list, tuple)) and len(self.dataset) else [None]
        is_text = all(isinstance(row, str) for row in rows)
        if not is_text and not all(
            isinstance(row, (list, tuple)) and all(type(token) is int for token in row) for row in rows
        ):
            raise TypeError(
                '`dataset` of Exl3Config has to be `None`, `"self"`, a list of texts or a list of lists of token ids, and not empty'
            )
        if self.tokenizer is not None and not is_text:
            raise ValueError("`tokenizer` of Exl3Config is for a `dataset` of texts, and this is one of token ids.")

    @staticmethod
    def _is_number(value) -> bool:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    @staticmethod
    def _written_number(value) -> int | float:
        """`value` as JSON can hold it: NumPy has numbers of its own."""
        return value if isinstance(value, (int, float)) else int(value) if value % 1 == 0 else float(value)

    @classmethod
    def _arguments(cls) -> list[str]:
        return [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]

    @classmethod
    def _check_unknown(cls, fields):
        """Raises `TypeError` for fields that are no arguments, with those that are like them."""
        known = cls._arguments()
        for name in fields:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise TypeError(f"Exl3Config has no argument `{name}`.{hint} It has {', '.join(f'`{n}`' for n in known)}.")

    def __eq__(self, other) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        # Converters before 0.0.9 wrote no codebook: what the tensors say is not to be overridden by a default.
        known = {"codebook": None} | {name: config_dict[name] for name in cls._arguments() if name in config_dict}
        result = super().from_dict(known, return_unused_kwargs, **kwargs)
        config = result[0] if return_unused_kwargs else result
        others = {name: value for name, value in config_dict.items() if name not in known and name != "quant_method"}
        config.converter_fields = copy.deepcopy(others)
        return result

    def get_loading_attributes(self):
        # Data for a checkpoint that is quantized is an error, which has to be seen.
        return {"dequantize": self.dequantize} | ({} if self.dataset is None else {"dataset": self.dataset})

    def to_dict(self) -> dict[str, Any]:
        written = ("bits", "head_bits", "embedding_bits", "codebook", "modules_to_not_convert", "overrides")
        fields = {name: getattr(self, name) for name in written if getattr(self, name) is not None}
        if "overrides" in fields:
            # As pairs: upstream sorts the keys of what it writes, and the last that matches counts.
            fields["overrides"] = [[pattern, rate] for pattern, rate in fields["overrides"].items()]
        return copy.deepcopy({"quant_method": "exl3", **fields, **self.converter_fields})
