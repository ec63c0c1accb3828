"""The rows of a CSV file with a header, as all tables that users bring are read."""

import csv
from collections.abc import Iterator
from pathlib import Path


def read_csv(path: str | Path, expected: str, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells) of the header, then of each row that is not empty; cells without the blanks around them.

    expected: the columns that the header should have, for messages. errors: as open's. Raises FileNotFoundError or
    ValueError: no file, no text, empty, no rows, a row of another length.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such CSV file; expected one with {expected}")
    header, count = None, 0
    try:
        with open(path, newline="", encoding="utf-8-sig", errors=errors) as file:
            reader = csv.reader(file)
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if not any(cells):
                    continue
                header = header or cells
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}; "
                        f"a comma in a cell needs quotes"
                    )
                count += 1
                yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: no CSV text file ({error}); save it as UTF-8") from None
    if count < 2:
        there = "a header and no rows" if count else "the file is empty"
        raise ValueError(f"{path}: {there}; expected a header with {expected}, and rows")
