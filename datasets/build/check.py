"""What is in a data set and what is wrong with it: python -m datasets.build check PATH

PATH is a data set's folder, or a text file of names, one a line. Exit code 0: fine, 1: problems, 2: cannot be checked.
"""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np

from datasets.build import flags, jobs
from datasets.build.check_names import NOTE, PROBLEM, Finding, check_database, check_queries, count_zooms, parse_names
from datasets.images import decode, read_bytes
from datasets.listing import list_files
from datasets.names import FIELDS
from datasets.overlap import INTERSECTIONS_FILE, load_intersections
from utils.arguments import positive, whole

NEARLY = 3  # levels of 255, in each band: what compression makes of one colour
FLAT = {
    "one": ("images of one colour", PROBLEM),
    "extreme": ("images that are black or white but for 1 % (ruined by a conversion?)", PROBLEM),
    "nearly": ("images of one colour but for 1 % (sea with an islet?)", NOTE),
}


def list_folder(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Folder -> paths of the database and of the queries, relative to it, and of other files in them."""
    (database, others), (queries, more) = (list_files(root, part) for part in ("database", "queries"))
    if not (database or queries):
        raise ValueError(f"{root}: no image in database/ or queries/; is it the folder of a data set?")
    return database, queries, sorted(others + more)


def list_file(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Text file of names -> the same. A name with a year for its timestamp is a database image's."""
    try:
        lines = [line.strip().replace("\\", "/") for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text; give a data set's folder, or a text file of names") from error
    database, queries = [], []
    for line in filter(None, lines):
        fields = line.split("@")
        in_database = len(fields[10]) == 4 if len(fields) == len(FIELDS) + 2 else "database/" in line
        (database if in_database else queries).append(line)
    if not (database or queries):
        raise ValueError(f"{path}: holds no name; give a data set's folder, or a text file of names, one a line")
    return database, queries, []


def look_at(path: Path) -> tuple[tuple[int, int], bytes, str | None] | str:
    """Image file -> ((width, height), digest of its bytes, key of FLAT or None), or a string: what is wrong."""
    try:
        content = read_bytes(path)
        pixels = decode(content, path).numpy()
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{path}: ")
    return pixels.shape[1::-1], hashlib.blake2b(content, digest_size=16).digest(), flatness(pixels)


def flatness(pixels: np.ndarray) -> str | None:
    """uint8 (H, W, 3) -> key of FLAT, or None where more than 1 % of the pixels are off the median by more than 3."""
    if all(np.ptp(pixels[..., band]) <= NEARLY for band in range(3)):
        return "one"
    some = pixels[:: -(-len(pixels) // 128), :: -(-pixels.shape[1] // 128)].reshape(-1, 3)  # 16,384 at most
    median = np.median(some, axis=0)
    if (np.abs(some - median) <= NEARLY).all(axis=1).mean() < 0.99:
        return None
    return "extreme" if (median <= NEARLY).all() or (median >= 255 - NEARLY).all() else "nearly"


def check_images(
    root: Path, database: list[str], queries: list[str], size: int | None = None, num_workers: int = 2
) -> tuple[list[Finding], dict[str, int]]:
    """Reads every image, once -> Findings, and {size: number of database images}. size: what the database's should be;
    None: what most of their folder YEAR_ZOOM are, as a zoom can have its own."""
    paths = database + queries
    # Decoding leaves Python's lock, so threads use all cores.
    seen = list(jobs.run([root / path for path in paths], look_at, num_workers, "images", threads=True))
    sizes = {}
    for path, result in zip(database, seen):
        if not isinstance(result, str):
            sizes.setdefault(zoom_of(path), Counter())[result[0]] += 1
    expected = {zoom: (size, size) if size else max(counts, key=counts.get) for zoom, counts in sizes.items()}
    unreadable, oblong, other_size, same, digests, flat = [], [], [], [], {}, {key: [] for key in FLAT}
    for i, (path, result) in enumerate(zip(paths, seen)):
        if isinstance(result, str):
            unreadable.append(f"{path}: {result}")
            continue
        found, digest, flatness_key = result
        if i < len(database) and found[0] != found[1]:
            oblong.append(f"{path}: {_text(found)}")
        elif i < len(database) and found != expected[zoom_of(path)]:
            other_size.append(f"{path}: {_text(found)}, not {_text(expected[zoom_of(path)])}")
        if flatness_key:
            flat[flatness_key].append(path)
        if flatness_key != "one" and digests.setdefault(digest, path) != path:
            same.append(f"{path}: as {digests[digest]}")
    square = "square database images of another size than "
    square += (
        "asked for" if size else "most of their zoom (all are resized when they are read: no harm but to sharpness)"
    )
    return [
        Finding("images that cannot be read", PROBLEM, unreadable),
        Finding("database images that are not square (reading squashes them, off their footprints)", PROBLEM, oblong),
        Finding(square, PROBLEM if size else NOTE, other_size),
        *[Finding(what, level, flat[key]) for key, (what, level) in FLAT.items()],
        Finding("images with the very bytes of another", PROBLEM, same),
    ], {_text(each): number for each, number in sum(sizes.values(), Counter()).most_common()}


def zoom_of(path: str) -> str:
    """database/YEAR_ZOOM/… -> ZOOM; '' for other paths."""
    return path.split("/")[1].partition("_")[2]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def check_positives(root: Path, database: list[str], queries: list[str]) -> list[Finding]:
    """The intersections file against the images -> Findings. Images are matched by file name, as in evaluation."""
    try:
        table = load_intersections(root / INTERSECTIONS_FILE)
    except (ValueError, FileNotFoundError) as error:
        return [Finding("intersections file that cannot be used", PROBLEM, [str(error)])]
    present = {name.rsplit("/", 1)[-1] for name in database}
    names = dict.fromkeys(name.rsplit("/", 1)[-1] for name in queries)
    entries = [(query, path, iou) for query, found in table.items() for path, iou in found]
    remedy = f"python -m datasets.overlap {root} writes {INTERSECTIONS_FILE} anew"
    return [
        Finding(
            f"positives that are not in the database ({remedy})",
            PROBLEM,
            [f"{query}: {path}" for query, path, iou in entries if path.rsplit("/", 1)[-1] not in present],
        ),
        Finding(
            "positives that have no IoU from 0 to 1",
            PROBLEM,
            [f"{query}: {path}, {iou}" for query, path, iou in entries if not 0 < iou <= 1 + 1e-6],
        ),
        Finding(
            f"queries that the intersections file does not list ({remedy})",
            PROBLEM,
            [name for name in names if name not in table],
        ),
        Finding("listed queries that are not there", PROBLEM, [name for name in table if name not in names]),
        Finding(
            "queries without a positive (evaluation leaves them out)",
            NOTE,
            [name for name, found in table.items() if not found and name in names],
        ),
    ]


def check(path: str | Path, names_only: bool = False, size: int | None = None, num_workers: int = 2) -> dict:
    """Folder or text file -> the report: a dict of counts and Findings (all of them, also the empty ones)."""
    path, began = Path(path), time.monotonic()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    is_folder = path.is_dir()
    database, queries, others = list_folder(path) if is_folder else list_file(path)
    (database_names, wrong), (query_names, also_wrong) = parse_names(database), parse_names(queries)
    findings, sizes = [Finding("names that do not parse", PROBLEM, wrong + also_wrong)], {}
    findings += check_database(database_names) + check_queries(query_names)
    if is_folder and queries:
        findings += check_positives(path, database, queries)
    findings.append(Finding("files that are no image (left by a build that was stopped, if .tmp)", NOTE, others))
    if is_folder and not names_only:
        more, sizes = check_images(path, database, queries, size, num_workers)
        findings += more
    return {
        "path": str(path),
        "database": len(database),
        "queries": len(queries),
        "zooms": count_zooms(database_names),
        "query_years": dict(sorted(Counter(query_names.columns.years.tolist()).items())),
        "sizes": sizes,
        "images_read": is_folder and not names_only,
        "seconds": round(time.monotonic() - began, 2),
        "findings": findings,
    }


def problems(report: dict) -> int:
    """How many items are wrong."""
    return sum(len(finding.items) for finding in report["findings"] if finding.level == PROBLEM)


def to_text(report: dict, show: int = 3) -> str:
    """The report for people; up to `show` items of each finding."""
    lines = [
        f"{report['path']}: {report['database']:,} database images, {report['queries']:,} queries, "
        + ("every image read" if report["images_read"] else "names only")
        + f", {report['seconds']:.1f} s"
    ]
    years = sorted({year for counts in report["zooms"].values() for year in counts})
    if years:
        lines += ["", f"{'':10}" + "".join(f"{year:>10}" for year in years)]
        lines += [
            f"{zoom:10}" + "".join(f"{counts.get(year, 0):>10,}" for year in years)
            for zoom, counts in report["zooms"].items()
        ]
    if report["sizes"]:
        lines.append("sizes: " + ", ".join(f"{size} ({number:,})" for size, number in report["sizes"].items()))
    if report["query_years"]:
        lines.append("queries: " + ", ".join(f"{year} {number:,}" for year, number in report["query_years"].items()))
    for level in (PROBLEM, NOTE):
        found = [finding for finding in report["findings"] if finding.level == level and finding.items]
        if found:
            lines += ["", f"{level}s"]
        for finding in found:
            lines.append(f"  {len(finding.items):,} {finding.what}")
            lines += [f"      {item}" for item in finding.items[:show]]
            if len(finding.items) > show > 0:
                lines.append(f"      … and {len(finding.items) - show:,} more (--json FILE lists all)")
    count = problems(report)
    return "\n".join(lines + ["", f"{count:,} problems" if count else "fine: no problem found"])


def to_json(report: dict) -> str:
    """The report for programs: all items of each finding."""
    findings = [
        {"what": finding.what, "level": finding.level, "count": len(finding.items), "items": finding.items}
        for finding in report["findings"]
        if finding.items
    ]
    return json.dumps({**report, "problems": problems(report), "findings": findings}, indent=1, ensure_ascii=False)


def main(
    path: Annotated[Path, "folder of a data set, or a text file of names, one a line"],
    names_only: Annotated[bool, "read no image"] = False,
    image_size: Annotated[
        int | None, "side of a database image; default: what most of its zoom have", {"type": positive}
    ] = None,
    num_workers: flags.Workers = flags.CORES,
    show: Annotated[int, "items printed of each finding", {"type": whole}] = 3,
    json: Annotated[Path | None, "the whole report", {"metavar": "FILE"}] = None,
) -> int:
    """-> Exit code."""
    if json and not json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {json}: its folder does not exist; make it first")
    report = check(path, names_only, image_size, num_workers)
    print(to_text(report, show))
    if json:
        json.write_text(to_json(report))
    return 1 if problems(report) else 0
