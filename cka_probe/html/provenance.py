"""The provenance of a report as lines of text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cka_probe.report import Report
from cka_probe.summary import LEVEL, MAX_NAMES, join_names

__all__ = ["provenance_lines"]

_READ = {  # keys of meta that have a line of their own, or are part of one
    "estimator", "kernel", "bandwidth", "reduce", "reference", "n_images", "groups", "batch_size",
    "seed", "resize", "antialias", "unbiased", "run", "left_out", "unreached", "skipped", "layers",
    "view_macs", "versions", "seconds",
}  # fmt: skip


def provenance_lines(report: Report) -> list[tuple[str, str]]:
    """How the report was made: (name, value) pairs, as far as its meta holds them."""
    meta = report.meta
    run: dict[str, Any] = meta["run"] if isinstance(meta.get("run"), dict) else {}
    kernel = str(meta.get("kernel", ""))
    if kernel == "rbf" and meta.get("bandwidth") is not None:
        kernel += f", sigma {meta['bandwidth']:g} of the median distance"
    debiased = {"True": ", debiased", "False": ", biased"}.get(str(meta.get("unbiased")), "")
    groups = f"{meta['groups']} groups of images" if meta.get("groups") else ""
    method = f"jackknife over {groups}, Student's t" if groups else ""
    lines = [
        *((name, _in_words(value)) for name, value in meta.items() if name not in _READ),
        ("data", _in_words(run.get("images"))),
        ("images", str(meta.get("n_images", ""))),
        ("left out", join_names(meta.get("left_out"))),
        ("files left out", meta.get("files_left_out")),
        ("views", _views(run.get("views"))),
        ("reference view", report.reference),
        ("resize", _resize(meta)),
        ("kernel", kernel),
        ("feature reduction", _in_words(meta.get("reduce"))),
        ("estimator", f"{meta.get('estimator', '')}{debiased}" if meta.get("estimator") else ""),
        ("batch size", _in_words(meta.get("batch_size"))),
        ("intervals", f"{100 * LEVEL:g} %, {method}" if method else "none"),
        ("seed", _in_words(meta.get("seed"))),
        ("mixed precision", "bfloat16" if run.get("amp") else ""),
        ("MACs per image", _macs(meta.get("view_macs"))),
        ("never reached", join_names(meta.get("unreached"))),
        ("cannot be tapped", join_names(meta.get("skipped"))),
        ("versions", _in_words(meta.get("versions"))),
        ("time taken", f"{meta['seconds']:g} s" if meta.get("seconds") else ""),
    ]
    return [(name.replace("_", " "), value) for name, value in lines if value]


def _in_words(value: Any) -> str:
    """Any value of meta in one line; of 64 hex digits (a SHA-256) the first 12."""
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, Mapping):
        parts = ((name, _in_words(part)) for name, part in value.items())
        return ", ".join(
            part if name == "name" else f"{name.replace('_', ' ')} {part}"
            for name, part in parts
            if part
        )
    if isinstance(value, list):
        return " ".join(map(_in_words, value)) if len(value) <= MAX_NAMES else join_names(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    is_sha = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}…" if is_sha else text


def _views(views: Any) -> str:
    """Each view's transform and its network's SHA-256 (once if all views share one)."""
    if not isinstance(views, dict):
        return ""
    shas = {name: _in_words(view.get("model")) for name, view in views.items()}
    one = len(set(shas.values())) == 1
    lines = [
        f"{name}: {_transform(view.get('transform'))}" + ("" if one else f", network {shas[name]}")
        for name, view in views.items()
    ]
    return "\n".join([*lines, *([f"network {next(iter(shas.values()))}"] if one else [])])


def _transform(transform: Any) -> str:
    """The repr of a transform; of our own `View(side_px=32, mean=None)` only what is set."""
    inner = re.fullmatch(r"View\((.*)\)", _in_words(transform))
    if not inner:
        return _in_words(transform) or "as they are"
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
    texts = []
    for view, count in macs.items():
        unit = next((u for u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= u[0]), (1, ""))
        texts.append(f"{view}: {count / unit[0]:.3g} {unit[1]}".rstrip())
    return " · ".join(texts)
