"""The zoo inside mmdet: backbones and detectors in its registry, and mmdet without compiled operators.

Nothing here is imported, registered or patched before `enable_mmdet()` is called, or, in a config of mmdet,
before `custom_imports = dict(imports=["domains.detection.openmmlab.register"])` imports that module.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from zoo.errors import ConfigError, MissingExtra

INSTALL = 'pip install "attention-zoo[mmdet]"'
RANGES = {"mmdet": ("3.3", "3.4"), "mmengine": ("0.10.7", "1"), "mmcv": ("2.0.0", "2.2")}
"""From the first version to below the second. mmdet asks for no mmcv, so that pip notices no wrong one."""


def enable_mmdet() -> None:
    """Make mmdet usable with or without compiled operators, and enter the zoo's parts into its registry.

    Where `mmcv` has no compiled operators (`mmcv-lite`), those that torchvision and this zoo have stand in,
    and any other raises an error that names it; a compiled `mmcv` is left as it is. Registers `ZooBackbone`
    and `ZooDetector`. Calling it again does nothing.

    Raises:
        MissingExtra: mmdet, mmengine or mmcv is not installed.
        ConfigError: a version that does not go with the others.
    """
    check_versions()
    from domains.detection.openmmlab import ops, reading

    ops.provide()
    reading.allow_histories()
    from domains.detection.openmmlab import backbone, detector

    backbone.register()
    detector.register()


def check_versions() -> None:
    """See that mmdet, mmengine and one mmcv are here, in versions that work together; imports none of them.

    Raises:
        MissingExtra: one is not installed.
        ConfigError: another version, or both `mmcv` and `mmcv-lite`.
    """
    full, lite = _version("mmcv"), _version("mmcv-lite")
    if full and lite:
        raise ConfigError(
            f"mmcv {full} and mmcv-lite {lite} are both installed, in the same folder. Remove both, then "
            f"install one: pip uninstall -y mmcv mmcv-lite; {INSTALL}"
        )
    found = {"mmdet": _version("mmdet"), "mmengine": _version("mmengine"), "mmcv": full or lite}
    missing = [name for name, number in found.items() if number is None]
    if missing:
        raise MissingExtra(f"This needs {' and '.join(missing)}: {INSTALL}")
    for name, number in found.items():
        first, beyond = RANGES[name]
        if not _parts(first) <= _parts(number or "") < _parts(beyond):
            raise ConfigError(f"{name} {number} is here; this needs {first} to below {beyond}: {INSTALL}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _parts(number: str) -> tuple[int, ...]:
    """`2.1.0rc1` to (2, 1, 0)."""
    parts = []
    for part in number.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
