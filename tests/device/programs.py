"""Programs that run on the pretended device, each in a process of its own: a device type cannot be taken back."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from places import ROOT
from warm import run_program

_BEFORE = """
import json, sys
sys.path[:0] = {folders!r}
import pretended, torch
torch.set_num_threads(1)
pretended.register()
with pretended.entered() as ledger:
    device = torch.device("pretend")
"""


def on_pretended(code: str, *folders: str, **values: object) -> Any:
    """Run code in which ``device`` is the pretended device and ``ledger`` counts, and give what it leaves in ``found``.

    Args:
        code: Python.
        *folders: Folders of ``tests`` whose modules it imports, besides ``device`` and ``support``.
        **values: What it finds under these names, as JSON carries it.
    """
    paths = [str(ROOT / "tests" / folder) for folder in ("device", "support", *folders)] + [str(ROOT / "tests")]
    given = "".join(f"    {name} = json.loads({json.dumps(value)!r})\n" for name, value in values.items())
    program = _BEFORE.format(folders=paths) + given + textwrap.indent(textwrap.dedent(code), "    ")
    done = run_program(program + "\nprint(json.dumps(found))\n", Path.cwd())
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
