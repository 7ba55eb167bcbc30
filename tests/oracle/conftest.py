"""Makes the official package importable: it needs torchaudio for a codec that is not used here."""

import importlib.machinery
import sys
import types

for _name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
    if _name not in sys.modules:
        _module = types.ModuleType(_name)
        _module.__spec__ = importlib.machinery.ModuleSpec(_name, loader=None)
        sys.modules[_name] = _module
