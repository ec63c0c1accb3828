"""The tables' script on a small world, and at full size where the public names are."""

from pathlib import Path

import numpy as np
import pytest

from datasets import grid
from datasets.metadata import ImageName
from experiments import names, table1

REAL_NAMES = Path(__file__).resolve().parents[2] / "shared" / "names"


def write_names(tmp_path, world):
    lists = {}
    for folder in ("queries", "database"):
        paths = sorted(str(path.relative_to(world.path)) for path in (world.path / folder).rglob("*.jpg"))
        lists[folder] = tmp_path / f"{folder}.txt"
        lists[folder].write_text("\n".join(paths) + "\n\n")
    return lists


def test_a_folder_and_files_of_names_give_the_same_tables(world, tmp_path, capsys):
    lists = write_names(tmp_path, world)
    from_folder = table1.main(table1.parse_arguments([str(world.path), "--database", str(world.path)]))
    text = capsys.readouterr().out
    from_files = table1.main(table1.parse_arguments([str(lists["queries"]), "--database", str(lists["database"])]))
    assert "24 images" in text and "Table 2, row Random choice" in text
    for name, (reach, one) in from_folder.items():
        assert (reach, len(one.query_rows), len(one.database_rows)) == (
            from_files[name][0], len(from_files[name][1].query_rows), len(from_files[name][1].database_rows))
    # Ten queries lie alternately in the two blocks of twelve regions.
    alps = from_folder["Alps"][1]
    assert len(alps.query_rows) + len(from_folder["Texas"][1].query_rows) == 10 and len(alps.database_rows) == 12


def test_random_choice_by_simulation(world):
    sets = table1.main(table1.parse_arguments([str(world.path), "--database", str(world.path)]))
    rng = np.random.default_rng(0)
    one = sets["Texas"][1]
    hits = [any(image in set(positives.tolist()) for image in rng.permutation(12)[:3])
            for positives in one.positives for _ in range(4000)]
    mean, recalls = table1.random_choice(sets, ks=(3,))["Texas"]
    assert recalls[3] == pytest.approx(100 * np.mean(hits), abs=1.5)
    assert mean == np.mean([len(positives) for positives in one.positives])


def test_names_that_the_grid_does_not_make_are_listed_with_their_fields(tmp_path, capsys):
    good = grid.image_path(9, 200, 100, 2021)
    folder, name = good.rsplit("/", 1)
    area = f"@{ImageName.parse(good).area}@"
    listed = tmp_path / "database.txt"
    listed.write_text("\n".join([good, name, f"elsewhere/{name}", good.replace(area, "@7@")]))
    assert names.main(names.parse_arguments([str(listed)])) == 2
    text = capsys.readouterr().out
    assert "2 of 4 names" in text and "folder:\n" in text and "sq_km_area:\n" in text
    listed.write_text(good.replace("09_0200_0100", "mine"))
    with pytest.raises(ValueError, match="field image_id is 'mine', expected zoom_row_col"):
        names.main(names.parse_arguments([str(listed)]))


@pytest.mark.slow
@pytest.mark.skipif(not REAL_NAMES.is_dir(), reason="the public names are not here")
def test_table_1_at_full_size():
    sets = table1.main(table1.parse_arguments([str(REAL_NAMES / "queries.txt")]))
    assert [len(one.query_rows) for _, one in sets.values()] == [6142, 2394, 3568, 727, 682, 2164]
    for name, (_, recalls) in table1.random_choice(sets).items():
        assert recalls[100] == pytest.approx(table1.RANDOM_CHOICE[name][2], rel=2 if name == "Amazon" else 0.1)
