"""Breaks the package in one place at a time, and says whether the quick tests notice.

    python tools/mutants.py [NAME ...] [--all] [--list]

Each mutant replaces a text that occurs exactly once in its file, in a copy of the checkout under
build/mutants, and runs the tests that should fail then; with --all, the whole quick tier. A mutant
that no test notices survives, which fails the run unless the list gives the reason.
"""

import argparse
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

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


MUTANTS = [
    # the ops' meaning
    Mutant(
        "the edit is subtracted",
        "ops/reference.py",
        "h = rows + (phi.unsqueeze(-1) * write).sum(1)",
        "h = rows - (phi.unsqueeze(-1) * write).sum(1)",
        "tests/ops/test_ops.py -k reference",
    ),
    Mutant(
        "the limits of a clamp change places",
        "ops/reference.py",
        "torch.minimum(torch.maximum(t, low), high) + b",
        "torch.minimum(torch.maximum(t, high), low) + b",
        "tests/ops/test_ops.py -k reference",
    ),
    Mutant(
        "the norm leaves eps out",
        "ops/reference.py",
        "+ eps)\n    return wide * scale",
        "+ 0.0)\n    return wide * scale",
        "tests/ops/test_ops.py -k reference",
    ),
    Mutant(
        "every token takes program 0",
        "ops/reference.py",
        "program = route.clamp(min=0).long()\n    return",
        "program = torch.zeros_like(route).long()\n    return",
        "tests/ops/test_ops.py -k reference",
    ),
    Mutant(
        "route -1 is steered",
        "ops/reference.py",
        "h, t = torch.where(plain, rows, h), t",
        "h, t = h, t",
        "tests/ops/test_ops.py -k reference",
    ),
    Mutant(
        "the adjoint writes along u",
        "ops/reference.py",
        "(push.unsqueeze(-1) * read).sum(1)",
        "(push.unsqueeze(-1) * write).sum(1)",
        "tests/ops/test_gradients.py",
    ),
    # the kernels: on the CPU, and those for CUDA in the emulator
    Mutant(
        "the clamp of phi is subtracted",
        "csrc/cpu/steer.inl",
        "phi.slope * t + phi.clamped_slope * clamped",
        "phi.slope * t - phi.clamped_slope * clamped",
        "tests/ops/test_ops.py -k cpu",
    ),
    Mutant(
        "a large score is not clamped",
        "csrc/cpu/steer.inl",
        "if (clamped > phi.high) clamped = phi.high;",
        "",
        "tests/ops/test_ops.py -k cpu",
    ),
    Mutant(
        "the last slot is not written",
        "csrc/cpu/steer.inl",
        "for (int64_t slot = 0; slot < used; slot++)\n      h +=",
        "for (int64_t slot = 0; slot + 1 < used; slot++)\n      h +=",
        "tests/ops/test_ops.py -k cpu",
    ),
    Mutant(
        "the CPU's norm leaves eps out",
        "csrc/cpu/rows.inl",
        "squares / (double)hidden + eps",
        "squares / (double)hidden",
        "tests/ops/test_ops.py -k cpu",
    ),
    Mutant(
        "CUDA's clamp has no lower limit",
        "csrc/cuda/program.cuh",
        "if (t < phi.low) clamped = phi.low;",
        "",
        "tests/ops/test_ops.py -k cuda_emulated",
    ),
    # interventions and the patch
    Mutant(
        "the strength is ignored",
        "intervention_base.py",
        "return self._replace(a=self.a * strength, c=self.c * strength, b=self.b * strength)",
        "return self",
        "tests/patching/test_patching.py tests/patching/test_patch_uses.py",
    ),
    Mutant(
        "an addition writes the unit vector",
        "interventions.py",
        "Slot(unit, vector, b=self.coefficient)",
        "Slot(unit, unit, b=self.coefficient)",
        "tests/patching/test_patching.py",
    ),
    Mutant(
        "the input of a block is that of the block after",
        "intervention_base.py",
        "return feeds == self.block_input",
        "return feeds == self.block_input + 1",
        "tests/patching/test_patching.py",
    ),
    Mutant(
        "edits that are not orthonormal are taken",
        "banks.py",
        "checked = (owners[:, None] != owners) | torch.diag(alone)",
        "checked = torch.diag(alone)",
        "tests/patching/test_patch_refusals.py tests/patching/test_routing.py tests/vllm_config",
    ),
    Mutant(
        "the route of a site is ignored",
        "patching/site.py",
        "route = None if cells is None else placed.rows(cells)",
        "route = None",
        "tests/patching/test_routing.py",
    ),
    Mutant(
        "rows that are left alone take the first set",
        "patching/site.py",
        "cells += [-1] * PHASES",
        "cells += [0] * PHASES",
        "tests/patching/test_routing.py",
    ),
    Mutant(
        "the fused norm forgets the weight's offset",
        "patching/site.py",
        "bank, params, route, link.offset)",
        "bank, params, route, 0.0)",
        "tests/families/test_families.py -k gemma",
    ),
    Mutant(
        "a norm takes what was left for another tensor",
        "patching/norm_links.py",
        "if pending is None or pending[0] is not x:",
        "if pending is None:",
        "tests/patching tests/families",
    ),
    Mutant(
        "a norm takes what was written over since",
        "patching/norm_links.py",
        "written = self.hooked() if pending[2] is None else pending[2] != x._version",
        "written = False",
        "tests/patching/test_patch_around.py tests/patching/test_patch_uses.py",
    ),
    Mutant(
        "a hook is left behind",
        "patching/handle.py",
        "                del hooks[number]\n",
        "                pass\n",
        "tests/patching/test_patch_around.py tests/patching/test_patching.py",
    ),
    Mutant(
        "the position of the last token is one off",
        "patching/route.py",
        "(place == end - 1).long() + 2 * generated",
        "(place == end - 2).long() + 2 * generated",
        "tests/patching/test_positions.py",
    ),
    # transformers
    Mutant(
        "the padding is not masked",
        "hf/batches.py",
        "return Batch(rows.tolist(), input_ids, real.long())",
        "return Batch(rows.tolist(), input_ids, torch.ones_like(input_ids))",
        "tests/research/extraction tests/research/evaluation/test_outcomes.py",
    ),
    Mutant(
        "the prefix does not move with the padding",
        "hf/prefix.py",
        "(columns - padding[:, None]).clamp(min=0)",
        "columns.expand(len(padding), -1)",
        "tests/hf/test_prefix.py",
    ),
    Mutant(
        "all rows take the first version of the prefix",
        "hf/prefix.py",
        "if versions is None else versions)",
        "if True else versions)",
        "tests/hf/test_prefix.py",
    ),
    Mutant(
        "answers come in the order of the batches",
        "hf/generate.py",
        "zip(batch.rows, out",
        "zip(sorted(batch.rows), out",
        "tests/research/evaluation/test_outcomes.py",
    ),
    Mutant(
        "special tokens are added twice",
        "hf/chat.py",
        'self.tokenizer(text, add_special_tokens=False)["input_ids"]',
        'self.tokenizer(text, add_special_tokens=True)["input_ids"]',
        "tests/research/test_prompts.py",
    ),
    Mutant(
        "an answer keeps its end token",
        "hf/generate.py",
        "return ids[:stop]",
        "return ids[: stop + 1]",
        "tests/hf/test_generate.py",
    ),
    # extraction
    Mutant(
        "tokens of the padding are read",
        "research/extraction/collect.py",
        "index = slots.where(mask.bool(), -1)",
        "index = slots.expand(mask.shape).contiguous()",
        "tests/research/extraction/test_collect.py",
    ),
    Mutant(
        "logits come in the order of the batches",
        "hf/forward.py",
        "return torch.stack([logits[row] for row in sorted(logits)])",
        "return torch.stack(list(logits.values()))",
        "tests/research/extraction tests/research/selection tests/research/test_sources.py",
    ),
    Mutant(
        "what a checkpoint holds is done again",
        "research/extraction/collect.py",
        "done = saved.load(moments, total)",
        "done = 0 * saved.load(moments, total)",
        "tests/research/extraction",
    ),
    Mutant(
        "the difference is harmless minus harmful",
        "research/extraction/moments.py",
        "difference = first - second",
        "difference = second - first",
        "tests/research/extraction",
    ),
    Mutant(
        "a merge of moments forgets the distance of the means",
        "research/extraction/moments.py",
        "m2 += m2_ + delta.square() * (n * m / all_)",
        "m2 += m2_",
        "tests/research/extraction",
    ),
    # selection
    Mutant(
        "the divergence is KL(q || p)",
        "research/selection/scoring.py",
        "return (p * (torch.log(p + KL_EPS) - torch.log(q + KL_EPS))).sum(dim=-1)",
        "return (q * (torch.log(q + KL_EPS) - torch.log(p + KL_EPS))).sum(dim=-1)",
        "tests/research/selection",
    ),
    Mutant(
        "the softmax of a refusal score is over the prompts",
        "research/selection/scoring.py",
        "part.double().softmax(dim=-1)[:, chosen]",
        "part.double().softmax(dim=0)[:, chosen]",
        "tests/research/selection",
    ),
    Mutant(
        "the worst candidate wins",
        "research/selection/algorithm.py",
        "best = min(left, key=",
        "best = max(left, key=",
        "tests/research/selection",
    ),
    Mutant(
        "one layer too many is measured",
        "research/selection/algorithm.py",
        "if layer >= limit:",
        "if layer > limit:",
        "tests/research/selection",
    ),
    Mutant(
        "a selection begins anew",
        "research/selection/measurement.py",
        "return int(done)\n",
        "return 0\n",
        "tests/research/selection",
    ),
    # evaluation
    Mutant(
        "the interval is too narrow",
        "research/evaluation/rates.py",
        "z2 / (4 * n * n)",
        "z2 / (8 * n * n)",
        "tests/research/evaluation",
    ),
    Mutant(
        "a verdict of one half is no hit",
        "research/evaluation/judges.py",
        "verdict >= 0.5 for",
        "verdict > 0.5 for",
        "tests/research/evaluation/test_judges.py",
    ),
    Mutant(
        "a typographic apostrophe hides a refusal",
        "research/evaluation/judges.py",
        'text.replace("\\u2019", "\'").lower()',
        "text.lower()",
        "tests/research/evaluation",
    ),
    Mutant(
        "the token itself predicts itself",
        "research/evaluation/likelihood.py",
        "before = scored.roll(-1, dims=1)",
        "before = scored.clone()",
        "tests/research/evaluation/test_likelihood.py",
    ),
    # weights
    Mutant(
        "biases that write are left",
        "weights/writers.py",
        "        if name in axis_of:\n",
        "        if name in axis_of and parameter.ndim > 1:\n",
        "tests/weights/test_orthogonalize.py",
    ),
    Mutant(
        "the output matrix stays tied to the embedding",
        "weights/in_memory.py",
        "nn.Parameter(weight.detach().clone(),",
        "nn.Parameter(weight.detach(),",
        "tests/weights/test_orthogonalize.py",
    ),
    Mutant(
        "the direction is not normalized",
        "weights/projection.py",
        "return direction.vector.double() / direction.norm",
        "return direction.vector.double()",
        "tests/weights/test_orthogonalize.py",
    ),
    Mutant(
        "an adapter adds the direction",
        "weights/lora.py",
        "times(weight, parts.modules[name], r)[None], -r[:, None]",
        "times(weight, parts.modules[name], r)[None], r[:, None]",
        "tests/weights/test_orthogonalize_lora.py",
    ),
    Mutant(
        "an adapter forgets the biases",
        "weights/lora.py",
        "    for name in parts.biases:\n        path, _, leaf",
        "    for name in []:\n        path, _, leaf",
        "tests/weights/test_orthogonalize_lora.py",
    ),
    # files
    Mutant(
        "a file that cannot be written leaves its parts",
        "files/atomic.py",
        "            temporary.unlink()\n\n\ndef check_space",
        "            pass\n\n\ndef check_space",
        "tests/files tests/test_direction.py",
    ),
    Mutant(
        "a file of any size is read",
        "files/atomic.py",
        "if size > limit_bytes:",
        "if size > limit_bytes * 1000:",
        "tests/files tests/test_direction.py",
    ),
    Mutant(
        "a control vector acts one block early",
        "files/control_vector.py",
        "layer=block + 1,",
        "layer=block,",
        "tests/files/test_convert.py",
    ),
    Mutant(
        "a direction's unit vector has its norm",
        "direction.py",
        "return (self.vector.double() / self.norm).float()",
        "return self.vector.float()",
        "tests/patching/test_patching.py",
    ),
    # vLLM
    Mutant(
        "the version of a program leaves its numbers out",
        "vllm/programs.py",
        "for tensor in (slot.read, slot.write, torch.tensor(slot[2:])):",
        "for tensor in (slot.read, slot.write):",
        "tests/vllm_config",
    ),
    Mutant(
        "the bank ignores the strength of a request",
        "vllm/bank.py",
        "numbers[..., :SCALED] *= strength",
        "numbers[..., :SCALED] *= 1.0",
        "tests/vllm_config",
    ),
    Mutant(
        "the cache mixes strengths",
        "vllm/requests.py",
        "text = f\"{version} {strength!r} {first} {end} {salt or ''}\"",
        "text = f\"{version} {first} {end} {salt or ''}\"",
        "tests/vllm_config",
    ),
]


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


def run_tests(arguments: Sequence[str]) -> tuple[int, str]:
    """Run pytest in the copy; return its exit code and what it said.

    In a fork: PyTorch and transformers were imported before, the package was not.
    """
    log = COPY / "build" / "mutant.log"
    log.parent.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        code = 99
        try:
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(COPY)
            os.environ.update(PYTHONPATH=str(COPY), OMP_NUM_THREADS="1")
            sys.path.insert(0, str(COPY))
            code = pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not full", *arguments])
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


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
        tests = ["-n", "2", "--dist", "loadgroup"] if everything else shlex.split(mutant.tests)
        code, said = run_tests(tests)
        if code == 0:
            return None
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if not failed:
            raise SystemExit(f"{mutant.name}: the tests did not run\n{said}")
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
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("tiny")  # torch and transformers, once for all
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
