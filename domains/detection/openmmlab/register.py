"""Importing this module is calling `enable_mmdet()`.

It is for the configs of mmdet, as
`custom_imports = dict(imports=["domains.detection.openmmlab.register"], allow_failed_imports=False)`.
"""

from __future__ import annotations

from domains.detection.openmmlab import enable_mmdet

enable_mmdet()
