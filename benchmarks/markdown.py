"""Result files as markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["about", "ms", "scenario", "table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table of numbers, but for the columns of words."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    marks = ("---" if i in words else "---:" for i in range(len(header)))
    lines.insert(1, f"|{'|'.join(marks)}|")
    return "\n".join(lines)


def ms(value: float) -> str:
    """Milliseconds with as many decimals as tell something."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def about(result: Mapping[str, Any]) -> str:
    """Machine, versions, commit and date, in a sentence."""
    machine, versions = result["machine"], result["versions"]
    gpu = result.get("gpu")
    where = f"{machine['cpu']} ({machine['isa']}), {result['threads']} threads"
    if gpu:
        where = f"{gpu['name']} (driver {gpu.get('driver') or 'unknown'}, CUDA {gpu['cuda']})"
    return f"{where}; torch {versions['torch']}, commit {result['commit']}, {result['date'][:10]}."


def scenario(found: Mapping[str, Any]) -> str:
    """A scenario as a heading and a table: ms an image, and the speed against the baseline."""
    title = "{kind}, {dtype}, batch {batch}, {size} x {size}".format(**found)
    if found.get("l2"):
        title += f", {found['l2']} L2"
    rows = found["contestants"]
    has_floor = "floor_ms_per_image" in found
    memory = {
        name: key
        for name, key in (("peak MB", "peak_mb_per_image"), ("saved MB", "saved_mb_per_image"))
        if any(key in row for row in rows)
    }
    header = ["", "ms an image", "p20", "p80", "speed", "error"]
    header += ["share of the floor"] * has_floor + [f"{name} an image" for name in memory]
    body = []
    for row in rows:
        name = f"**{row['name']}**" if row["name"].startswith("ours") else row["name"]
        if "ms_per_image" not in row:
            body.append([name, f"{row['status']}: {row['reason']}", *[""] * (len(header) - 2)])
            continue
        times = row["ms_per_image"]
        cells = [name, *(ms(times[key]) for key in ("median", "p20", "p80"))]
        cells.append(f"{row['speedup']:.2f}x" if row["speedup"] else "")
        cells.append("" if row["error"] is None else f"{row['error']:.1e}")
        if row["status"] != "ok":
            cells[-1] += f" **{row['status']}**"
        if has_floor:
            cells.append(f"{100 * row['share_of_floor']:.0f} %")
        cells += [f"{row[key]:.1f}" if key in row else "" for key in memory.values()]
        body.append(cells)
    lines = [f"### {title}", ""]
    if has_floor:
        floor = ms(found["floor_ms_per_image"])
        lines += [f"Floor: {floor} ms an image ({found['floor_of']}).", ""]
    if counters := found.get("counters"):
        lines += [f"Counted on the emulator: {counters_text(counters)}.", ""]
    return "\n".join([*lines, table(header, body)])


def counters_text(counters: Mapping[str, Any]) -> str:
    """What the emulator counts, in words."""
    return (
        f"{counters['launches']} launches, {counters['bytes_touched_per_image'] / 1e6:.2f} MB "
        f"touched and {counters['bytes_issued_per_image'] / 1e6:.1f} MB issued an image, "
        f"{100 * counters['useful_mac_share']:.1f} % of the multiply-accumulates useful"
    )
