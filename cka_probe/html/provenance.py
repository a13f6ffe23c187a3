"""How a report was made, in lines for a reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cka_probe.report import Report
from cka_probe.summary import LEVEL, NAMED, listed

__all__ = ["facts"]

_READ = {  # meta that `facts` puts into lines of its own, or that other lines hold
    "estimator", "kernel", "bandwidth", "reduce", "reference", "n_images", "groups", "batch_size",
    "seed", "resize", "antialias", "unbiased", "run", "left_out", "unreached", "skipped", "layers",
    "view_macs", "versions", "seconds",
}  # fmt: skip


def facts(report: Report) -> list[tuple[str, str]]:
    """How the report was made: (name, value) lines for a reader, as far as its meta tells."""
    meta = report.meta
    run: dict[str, Any] = meta["run"] if isinstance(meta.get("run"), dict) else {}
    kernel = str(meta.get("kernel", ""))
    if kernel == "rbf" and meta.get("bandwidth") is not None:
        kernel += f", sigma {meta['bandwidth']:g} of the median distance"
    debiased = {"True": ", debiased", "False": ", biased"}.get(str(meta.get("unbiased")), "")
    groups = f"{meta['groups']} groups of images" if meta.get("groups") else ""
    method = f"jackknife over {groups}, Student's t" if groups else ""
    lines = [
        *((name, _told(value)) for name, value in meta.items() if name not in _READ),
        ("data", _told(run.get("images"))),
        ("images", str(meta.get("n_images", ""))),
        ("left out", listed(meta.get("left_out"))),
        ("views", _views(run.get("views"))),
        ("reference view", report.reference),
        ("resize", _resize(meta)),
        ("kernel", kernel),
        ("feature reduction", _told(meta.get("reduce"))),
        ("estimator", f"{meta.get('estimator', '')}{debiased}" if meta.get("estimator") else ""),
        ("batch size", _told(meta.get("batch_size"))),
        ("intervals", f"{100 * LEVEL:g} %, {method}" if method else "none"),
        ("seed", _told(meta.get("seed"))),
        ("mixed precision", "bfloat16" if run.get("amp") else ""),
        ("MACs per image", _macs(meta.get("view_macs"))),
        ("never reached", listed(meta.get("unreached"))),
        ("cannot be tapped", listed(meta.get("skipped"))),
        ("versions", _told(meta.get("versions"))),
        ("time taken", f"{meta['seconds']:g} s" if meta.get("seconds") else ""),
    ]
    return [(name.replace("_", " "), value) for name, value in lines if value]


def _told(value: Any) -> str:
    """Any value of meta in one line; 64 hex digits are a SHA-256, of which 12 are shown."""
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, Mapping):
        parts = ((name, _told(part)) for name, part in value.items())
        return ", ".join(
            part if name == "name" else f"{name.replace('_', ' ')} {part}"
            for name, part in parts
            if part
        )
    if isinstance(value, list):
        return " ".join(map(_told, value)) if len(value) <= NAMED else listed(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    is_sha = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_sha else text


def _views(views: Any) -> str:
    """Each view's transform, and its network's SHA-256 (once where all share one)."""
    if not isinstance(views, dict):
        return ""
    shas = {name: _told(view.get("model")) for name, view in views.items()}
    one = len(set(shas.values())) == 1
    lines = [
        f"{name}: {_transform(view.get('transform'))}" + ("" if one else f", network {shas[name]}")
        for name, view in views.items()
    ]
    return "\n".join([*lines, *([f"network {next(iter(shas.values()))}"] if one else [])])


def _transform(transform: Any) -> str:
    """A transform's printed form; of our own only what is set."""
    inner = re.fullmatch(r"View\((.*)\)", _told(transform))
    if not inner:
        return _told(transform) or "as they are"
    parts = re.split(r", (?=\w+=)", inner[1])
    return ", ".join(part.replace("=", " ", 1) for part in parts if not part.endswith("=None"))


def _resize(meta: Mapping[str, Any]) -> str:
    if not meta.get("resize"):
        return ""
    return f"{meta['resize']}, {'' if meta.get('antialias', True) else 'not '}antialiased"


def _macs(macs: Any) -> str:
    """MACs of each view, in thousands, millions or billions."""
    if not isinstance(macs, Mapping):
        return ""
    told = []
    for view, count in macs.items():
        unit = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= u[0]), (1, ""))
        told.append(f"{view}: {count / unit[0]:.3g} {unit[1]}".rstrip())
    return " · ".join(told)
