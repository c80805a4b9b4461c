"""A WordNet database of a dozen words."""

from pathlib import Path

INDEX = {
    "noun": "  1 a licence\ndog n 2 2 @ ~ 2 1 00000011 00000012\nox n 1 0 1 0 00000013\nrun n 1 0 1 0 00000014\n"
    "church n 1 1 @ 1 0 00000015\nwolf n 1 0 1 0 00000016\npan n 1 0 1 0 00000018\n",
    "verb": "run v 1 0 1 0 00000021\nbark v 1 2 @ ~ 1 0 00000022\nhop v 1 0 1 0 00000023\n",
    "adj": "big a 1 0 1 0 00000031\nlarge a 1 0 1 0 00000032\n",
    "adv": "soon r 1 0 1 0 00000041\n",
}


EXCEPTIONS = {"noun": "oxen ox\n", "verb": "ran run\nhopping hop\n", "adj": "bigger big\n", "adv": ""}


def write_wordnet(folder: Path) -> Path:
    """Write the index and exception files that `resources.inputs.wordnet` reads."""
    folder.mkdir()
    for part in INDEX:
        (folder / f"index.{part}").write_text(INDEX[part])
        (folder / f"{part}.exc").write_text(EXCEPTIONS[part])
    return folder
