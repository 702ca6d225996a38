"""Breaks the package in one place at a time, and says whether the quick tests notice.

    python tools/mutants.py [NAME ...] [--all] [--list]

Each mutant replaces a text that occurs exactly once in its file, in a copy of the checkout under
build/mutants, and runs the tests that should fail then; with --all, the whole quick tier. A mutant
that no test notices survives, which fails the run unless the list gives the reason.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutants"


@dataclass(frozen=True)
class Mutant:
    """One mistake that somebody could make.

    Attributes
    ----------
    name
        What is wrong.
    file
        Where, under `refusal_kernels/` or `csrc/`.
    old, new
        The text that is replaced, and by what.
    tests
        Arguments of pytest: the tests that should notice.
    survives
        Why no test can notice, where that is so.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    survives: str = ""

    def path(self, root: Path = ROOT) -> Path:
        """Return the file in a checkout."""
        return root / ("" if self.file.startswith("csrc") else "refusal_kernels") / self.file

    def applied(self) -> str:
        """Return the text of the file with the mistake in it."""
        text = self.path().read_text()
        count = text.count(self.old)
        if count != 1:
            raise SystemExit(f"{self.name}: its text occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


MUTANTS: list[Mutant] = []


def copy_checkout() -> None:
    """Bring the copy to the state of the checkout; what was compiled there is kept."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    extensions = [str(path.relative_to(ROOT)) for path in ROOT.glob("refusal_kernels/_C*.so")]
    wanted = {name for name in [*names.splitlines(), *extensions] if (ROOT / name).is_file()}
    for path in sorted(COPY.rglob("*")):
        inside = path.relative_to(COPY)
        if path.is_file() and inside.parts[0] != "build" and str(inside) not in wanted:
            path.unlink()
    for name in sorted(wanted):
        source, target = ROOT / name, COPY / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def run(mutant: Mutant, everything: bool) -> str | None:
    """Return what noticed the mutant: a test, or the compiler; None if nothing did."""
    path = mutant.path(COPY)
    before = path.read_bytes()
    path.write_text(mutant.applied())
    try:
        if mutant.file.startswith("csrc/cpu"):
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            if subprocess.run(build, cwd=COPY, capture_output=True, check=False).returncode:
                return "the compiler"
        tests = ["-n", "2", "--dist", "loadgroup"] if everything else mutant.tests.split()
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        environment = dict(os.environ, PYTHONPATH=str(COPY), OMP_NUM_THREADS="1")
        done = subprocess.run(
            [*command, "-m", "not full"],
            cwd=COPY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return None
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode != 1 or not failed:
            raise SystemExit(f"{mutant.name}: the tests did not run\n{done.stdout}{done.stderr}")
        return failed[0].split()[1]
    finally:
        path.write_bytes(before)
        for extension in ROOT.glob("refusal_kernels/_C*.so"):
            shutil.copyfile(extension, COPY / "refusal_kernels" / extension.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a name; all without")
    parser.add_argument("--all", action="store_true", help="run the whole quick tier on each")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    for mutant in chosen:
        mutant.applied()
    if options.list:
        print(*(f"{mutant.file}: {mutant.name}" for mutant in chosen), sep="\n")
        return 0
    copy_checkout()
    survivors = []
    for mutant in chosen:
        start = time.monotonic()
        noticed = run(mutant, options.all)
        verdict = f"killed by {noticed}" if noticed else f"SURVIVED {mutant.survives}"
        print(f"{mutant.name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
        if not noticed and not mutant.survives:
            survivors.append(mutant.name)
    print(f"{len(chosen)} mutants, {len(survivors)} survived without a reason")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
