"""The state of a `bomkern.GoalSet` beside its buffers, packed into tensors for any format of checkpoints.

A packed state is one uint8 tensor: the length of a text as 8 bytes, the text (JSON, with the names of goals), and
float32 numbers. safetensors, for example, takes nothing but tensors. `torch.distributed.checkpoint` loads in place, so
the size depends on the goals alone, and not on the number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .history import CAPACITY, History
from .record import Layout

FORMAT = 1
ROOM = 1024  # packed rows beside the `CAPACITY` rows of a history: steps that fill no row yet, and those not taken yet
Values = Mapping[str, Any]  # plain values by name


def pack(fixed: Values, changing: Values, spare: int, rows: Tensor | None = None) -> Tensor:
    """Pack plain values and float32 rows into one uint8 tensor on the host.

    Args:
        fixed: values that are the same in the whole run.
        changing: values that take at most ``spare`` bytes; more make the tensor larger.
    """
    text = json.dumps([{"format": FORMAT, **fixed}, changing]).encode()
    length = max(len(text), len(json.dumps(fixed)) + spare)
    head = bytearray(length.to_bytes(8, "little") + text.ljust(length))
    parts = [torch.frombuffer(head, dtype=torch.uint8)]
    if rows is not None:
        parts.append(rows.contiguous().view(-1).view(torch.uint8))
    return torch.cat(parts)


def unpack(packed: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the values and the float32 numbers, [n], of a packed state.

    Raises:
        ValueError: the tensor holds something else.
    """
    data = packed.detach().to("cpu", torch.uint8).flatten()  # some tools convert all tensors to a float dtype
    try:
        length = int.from_bytes(bytes(data[:8].tolist()), "little")
        fixed, changing = json.loads(bytes(data[8 : 8 + length].tolist()))
        values = {**fixed, **changing}
        known = values["format"]
    except (ValueError, TypeError, KeyError) as why:
        raise ValueError(f"the tensor, {list(packed.shape)} {packed.dtype}, is not the state of a GoalSet") from why
    if known > FORMAT:
        raise ValueError(f"the state of the GoalSet has format {known}, and this bomkern reads up to {FORMAT}: update")
    return values, data[8 + length :].clone().view(torch.float32)


def names_of(layout: Layout) -> dict[str, Any]:
    return {"goals": layout.goals, "columns": layout.columns, "owner": layout.owner}


def pack_history(layout: Layout, state: Values) -> Tensor:
    """Pack the state of a `Monitor`: ``steps``, ``first``, ``stride``, and ``rows``, ``open`` and ``fresh``.

    The last three are records, with the numbers of samples that they rest on in ``counts``, ``open_counts`` and
    ``fresh_counts``. These are at the end of the tensor, which has the size that it had before it held them.
    """
    rows = layout.counted(state["rows"], state["counts"])
    opened = layout.counted(state["open"], state["open_counts"])
    fresh = layout.counted(state["fresh"], state["fresh_counts"])
    size = layout.size
    room = (CAPACITY + ROOM) * size // (size + len(layout.columns)) - CAPACITY
    # Only a run of many steps has more open steps than fit: then groups of them are saved as their means.
    every = -(-len(opened) // room) or 1
    groups = [len(group) for group in opened.split(every)] if len(opened) else []
    join = History(layout)._join
    joined = [join(group, len(group)) for group in opened.split(every)] if len(opened) else []
    # A history of single steps ends with those not taken yet. Otherwise the oldest of them may have no room.
    tail = state["stride"] == 1 and len(fresh) <= len(rows)
    kept = fresh[:0] if tail else fresh[len(fresh) - min(len(fresh), room - len(groups)) :]
    used = torch.cat([rows, *joined, kept])
    whole = used.new_zeros((CAPACITY + ROOM) * size)
    whole[: len(used) * size] = used[:, :size].flatten()
    whole[len(whole) - len(used) * len(layout.columns) :] = used[:, size:].flatten()
    changing = {
        **{name: state[name] for name in ("steps", "first", "stride")},
        "rows": len(rows),
        "open": [every, len(opened)],
        "fresh": len(fresh) if tail else len(kept),
        "tail": tail,
        "counted": len(used),
    }
    return pack(names_of(layout), changing, 256, whole)


def unpack_history(packed: Tensor) -> dict[str, Any]:
    """Return the state that `pack_history` was given, and the names of its goals. Raises ValueError."""
    values, numbers = unpack(packed)
    names = Layout(values["goals"], values["columns"], values["owner"], [])
    whole, size = numbers.view(-1, names.size), names.size
    used = values.get("counted", 0)  # an older bomkern has saved no numbers of samples
    counts = numbers[len(numbers) - used * len(names.columns) :].view(used, -1) if used else None
    whole = names.counted(whole[:used], counts) if used else names.counted(whole)
    every, count = values["open"]
    groups = [min(every, count - at) for at in range(0, count, every)]
    rows, joined, rest = whole.split([values["rows"], len(groups), len(whole) - values["rows"] - len(groups)])
    fresh = rows[len(rows) - values["fresh"] :] if values["tail"] else rest[: values["fresh"]]
    opened = joined.repeat_interleave(torch.tensor(groups, dtype=torch.int64, device="cpu"), 0)
    found = {}
    for name, part in {"": rows, "open": opened, "fresh": fresh}.items():
        found[name or "rows"] = part[:, :size].clone()
        found[f"{name}_counts".lstrip("_")] = part[:, size:].clone()
    return {**values, **found}


def picked(saved: Tensor, at: Sequence[int | None], missing: Tensor | float) -> Tensor:
    """Return entries of a saved tensor [S, ...] in another order, [N, ...].

    Args:
        at: for each of the N entries its index in ``saved``, or None.
        missing: the entries without an index: one number, or [N, ...].
    """
    known = [k for k, index in enumerate(at) if index is not None]
    out = saved.new_empty(len(at), *saved.shape[1:])
    out.copy_(missing) if isinstance(missing, Tensor) else out.fill_(missing)
    if known:
        places, sources = (torch.tensor(x, device=saved.device) for x in (known, [at[k] for k in known]))
        out.index_copy_(0, places, saved.index_select(0, sources))
    return out


def picked_records(
    records: Tensor, saved: Layout, goals: Sequence[int | None], columns: Sequence[int | None]
) -> Tensor:
    """Return records [n, size] of other goals; a goal without an index in ``saved`` is NaN."""
    parts = saved.at._fields
    sizes = [len(saved.goals)] * 3 + [len(saved.columns)] * 4 + [1, 1]
    split = dict(zip(parts, records.split(sizes, -1), strict=True))
    out = []
    for name, part in split.items():
        at = goals if name in parts[:3] else columns if name in parts[3:7] else [0]
        out.append(picked(part.t(), at, torch.nan).t())
    return torch.cat(out, -1)
