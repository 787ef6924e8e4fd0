"The Big Little Decoder: a small model drafts, a large model verifies."
from importlib import import_module

__version__ = "0.2.0"

_modules = {"policy": ["Policy", "Confidence", "Fixed", "NLL", "Greedy", "parse_policy"],
            "decoder": ["Decoder"],
            "early": ["early_exit"],
            "stream": ["BigLittleDecoder"],  # the one of `decode`, with pictures and streams attached
            "accept": ["Relative", "Ensemble", "Budget", "Rejection"],
            "generate": ["bild_generate"],
            "pair": ["load_pair", "Pair"],
            "objectives": ["agreement"],
            "recipe": ["Recipe"],
            "tasks": ["Task"]}
_module_of = {name: module for module, names in _modules.items() for name in names}
__all__ = list(_module_of)


def __getattr__(name):
    "Import `name`'s module on first use, so that `bild --help` does not wait for torch."
    if name not in _module_of: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_module_of[name]}"), name)


def __dir__(): return sorted([*globals(), *__all__])
