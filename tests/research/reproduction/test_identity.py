"""What a reproduction takes for the same weights."""

from pathlib import Path
from types import SimpleNamespace

from refusal_kernels.cli.reproduce import identity_of

MODEL = SimpleNamespace(config=SimpleNamespace(_commit_hash="abc"))


def test_weights_are_told_apart(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "m.gguf"
    seen = []
    for content in ("one", "other"):
        file.write_text(content)
        seen.append(identity_of(file, MODEL))
        assert identity_of(folder, MODEL) == seen[-1]
    for name in ("org/a", "org/b"):  # adapters of the hub on one model of the hub
        seen.append(identity_of(Path(name), MODEL))
    assert len({str(identity) for identity in seen}) == len(seen)
    assert identity_of(file, MODEL) == identity_of(file, MODEL)
