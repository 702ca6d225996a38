"""Make the environments of the peers: `.venv-peers/NAME`, each with what `peers/NAME.txt` pins.

    python benchmarks/setup_peers.py [NAME ...]

PyTorch goes first and alone, as the Makefile does it: whatever else asks for torch is then
satisfied by it. An environment that has what its file pins is left as it is.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
TORCH = os.environ.get("TORCH", "torch==2.13.0")


def set_up(name: str) -> str:
    """Make one environment; return what there is to say of it."""
    folder = ROOT / ".venv-peers" / name
    pinned, mark = HERE / "peers" / f"{name}.txt", folder / ".ready"
    wanted = f"{TORCH}\n{pinned.read_text()}"
    if mark.is_file() and mark.read_text() == wanted:
        return "ready"
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    pip.append("--disable-pip-version-check")
    for what in ([TORCH, "numpy"], [TORCH, "-r", str(pinned)]):
        done = subprocess.run([*pip, *what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = done.stdout.decode(errors="replace").strip().splitlines()
            return f"failed: {lines[-1] if lines else done.returncode}"
    mark.write_text(wanted)
    return "set up"


def main() -> None:
    known = sorted(path.stem for path in (HERE / "peers").glob("*.txt"))
    names = sys.argv[1:] or known
    if unknown := set(names) - set(known):
        sys.exit(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = False
    for name in names:
        text = set_up(name)
        print(f"{name}: {text}", flush=True)
        failed |= text.startswith("failed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
