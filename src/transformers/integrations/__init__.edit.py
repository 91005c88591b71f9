_import_structure = {
    **...,
    "exl3": ["Exl3Linear", "replace_with_exl3_modules", "separate_experts"],
}

if TYPE_CHECKING:
    ...
    from .exl3 import Exl3Linear, replace_with_exl3_modules, separate_experts
