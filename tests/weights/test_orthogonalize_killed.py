"""kill -9 while a checkpoint is written: the next run finishes, and never is half of one there."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoints import contents, direction, save
from tiny import full

from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint

pytestmark = pytest.mark.skipif(
    not hasattr(__import__("os"), "fork"), reason="processes are forked"
)

# One process imports everything and forks the runs, so that each begins at once.
SERVER = textwrap.dedent(
    """
    import itertools, json, os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    import refusal_kernels as rk
    from refusal_kernels.weights import checkpoint

    torch.set_num_threads(1)
    os.fsync = lambda number: None  # nothing here depends on the disk
    source, target, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    direction = rk.Direction.load(sys.argv[4])
    partial = target.with_name(f".{target.name}.partial")
    replace, rename, unlink = os.replace, Path.rename, Path.unlink
    choice = random.Random(1)

    def run(slow=0.0, die_at=None):
        # die_at: dies before (an even number) or after (odd) the nth change of a name
        count = 0

        def changing(change):
            def changed(*arguments, **options):
                nonlocal count
                if die_at == 2 * count:
                    os.kill(os.getpid(), signal.SIGKILL)
                change(*arguments, **options)
                if die_at == 2 * count + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
            return changed

        os.replace = changing(replace)
        Path.rename, Path.unlink = changing(rename), changing(unlink)
        rk.orthogonalize_checkpoint(
            source, target, direction, progress=lambda *_: time.sleep(slow)
        )

    def forked(kill_after=None, **options):
        start = time.monotonic()
        child = os.fork()
        if not child:
            try:
                run(**options)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(3)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return None
        assert os.WEXITSTATUS(status) == 0
        return time.monotonic() - start

    def contents():
        files = [path for path in target.rglob("*") if path.is_file()]
        return {str(path.relative_to(target)): path.read_bytes().hex() for path in files}

    # also imports what a run imports
    plan = checkpoint.make_plan(source, checkpoint.read_shards(source), direction, False)
    if not kills:  # every name: the same for every run
        checkpoint.make_plan = lambda *arguments: plan
        checkpoint._check_untied = lambda *arguments: None
    slow = 0.03
    length = forked(slow=slow)
    whole = contents()
    result = {"whole": whole, "killed": 0, "midway": 0}
    for number in range(6 * kills) if kills else itertools.count():
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        at_random = {"kill_after": choice.uniform(0.0, length), "slow": slow}
        if forked(**(at_random if kills else {"die_at": number})) is not None:
            if kills:
                continue
            break
        result["killed"] += 1
        result["midway"] += (partial / ".state.json").exists()
        assert not target.exists() or contents() == whole, f"half a folder at {number}"
        if not target.exists():
            assert forked() is not None
        assert contents() == whole, f"another result at {number}"
        assert not partial.exists()
        if result["killed"] == kills:
            break
    print(json.dumps(result))
    """
)


@pytest.mark.parametrize("kills", [0, full(10)])
def test_killed_and_run_again(tmp_path: Path, kills: int) -> None:
    """At so many random moments; with 0 before and after every change of a name."""
    source, target = tmp_path / "source", tmp_path / "target"
    save(source, tie_word_embeddings=True, num_hidden_layers=1)
    assert len(list(source.glob("*.safetensors"))) == 2
    direction().save(tmp_path / "direction.safetensors")
    orthogonalize_checkpoint(source, tmp_path / "whole", direction())
    arguments = [source, target, kills, tmp_path / "direction.safetensors"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVER, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    whole = {name: data.hex() for name, data in contents(tmp_path / "whole").items()}
    assert result["whole"] == whole
    if kills:
        assert result["killed"] == kills
        assert result["midway"] >= kills // 10
    else:  # before and after: two shards and their states, the files that go along, the folder
        assert result["killed"] > 2 * (2 * 2 + 4 + 1)
