"""What is in a data set and what is wrong with it: python -m datasets.build check PATH

PATH is a data set's folder, or a text file of names, one a line. Exit code 0: fine, 1: problems, 2: cannot be checked.
"""

import hashlib
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

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


def list_folder(root):
    """Folder -> paths of the database and of the queries, relative to it, and of other files in them."""
    (database, others), (queries, more) = (list_files(root, part) for part in ("database", "queries"))
    if not (database or queries):
        raise ValueError(f"{root}: no image in database/ or queries/; is it the folder of a data set?")
    return database, queries, sorted(others + more)


def list_file(path):
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


def look_at(path):
    """Image file -> ((width, height), digest of its bytes, key of FLAT or None), or a string: what is wrong."""
    try:
        content = read_bytes(path)
        pixels = decode(content, path).numpy()
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{path}: ")
    return pixels.shape[1::-1], hashlib.blake2b(content, digest_size=16).digest(), flatness(pixels)


def flatness(pixels):
    """uint8 (H, W, 3) -> key of FLAT, or None where more than 1 % of the pixels are off the median by more than 3."""
    if all(np.ptp(pixels[..., band]) <= NEARLY for band in range(3)):
        return "one"
    some = pixels[:: -(-len(pixels) // 128), :: -(-pixels.shape[1] // 128)].reshape(-1, 3)  # 16,384 at most
    median = np.median(some, axis=0)
    if (np.abs(some - median) <= NEARLY).all(axis=1).mean() < 0.99:
        return None
    return "extreme" if (median <= NEARLY).all() or (median >= 255 - NEARLY).all() else "nearly"


def check_images(root, database, queries, size=None, num_workers=2):
    """Reads every image, once -> Findings, and {size: number of database images}. size: what the database's should be;
    None: what most of them are."""
    paths = database + queries
    # Decoding leaves Python's lock, so threads use all cores; in pieces, so that few futures wait at a time.
    bar = tqdm(total=len(paths), desc="images", unit="image", mininterval=0.5)
    with ThreadPoolExecutor(max(1, num_workers)) as pool, bar:
        seen = []
        for start in range(0, len(paths), 4096):
            for result in pool.map(look_at, [root / path for path in paths[start : start + 4096]]):
                seen.append(result)
                bar.update()
    sizes = Counter(result[0] for result in seen[: len(database)] if not isinstance(result, str))
    expected = (size, size) if size else max(sizes, key=sizes.get) if sizes else None
    unreadable, wrong_size, same, digests, flat = [], [], [], {}, {key: [] for key in FLAT}
    for i, (path, result) in enumerate(zip(paths, seen)):
        if isinstance(result, str):
            unreadable.append(f"{path}: {result}")
            continue
        (width, height), digest, flatness_key = result
        if i < len(database) and ((width, height) != expected or width != height):
            wrong_size.append(f"{path}: {width} × {height}")
        if flatness_key:
            flat[flatness_key].append(path)
        if flatness_key != "one" and digests.setdefault(digest, path) != path:
            same.append(f"{path}: as {digests[digest]}")
    wanted = f"{expected[0]} × {expected[1]}" if expected else ""
    return [
        Finding("images that cannot be read", PROBLEM, unreadable),
        Finding(f"database images that are not {wanted} and square", PROBLEM, wrong_size),
        *[Finding(what, level, flat[key]) for key, (what, level) in FLAT.items()],
        Finding("images with the very bytes of another", PROBLEM, same),
    ], {f"{width} × {height}": number for (width, height), number in sizes.most_common()}


def check_positives(root, database, queries):
    """The intersections file against the images -> Findings. Images are matched by file name, as in evaluation."""
    path = root / INTERSECTIONS_FILE
    try:
        table = load_intersections(path)
    except (ValueError, FileNotFoundError) as error:
        return [Finding("intersections file that cannot be used", PROBLEM, [str(error)])]
    present = {name.rsplit("/", 1)[-1] for name in database}
    names = [name.rsplit("/", 1)[-1] for name in queries]
    known = set(names)
    gone, absurd, empty = [], [], []
    for query, entries in table.items():
        for entry in entries:
            if not (
                isinstance(entry, (tuple, list))
                and len(entry) == 2
                and isinstance(entry[0], str)
                and 0 < entry[1] <= 1 + 1e-6
            ):
                absurd.append(f"{query}: {entry!r}")
            elif entry[0].rsplit("/", 1)[-1] not in present:
                gone.append(f"{query}: {entry[0]}")
        if not entries and query in known:
            empty.append(query)
    remedy = f"python -m datasets.overlap {root} writes {INTERSECTIONS_FILE} anew"
    return [
        Finding(f"positives that are not in the database ({remedy})", PROBLEM, gone),
        Finding("positives that are no (path, IoU from 0 to 1)", PROBLEM, absurd),
        Finding(
            f"queries that the intersections file does not list ({remedy})",
            PROBLEM,
            [name for name in names if name not in table],
        ),
        Finding("listed queries that are not there", PROBLEM, [name for name in table if name not in known]),
        Finding("queries without a positive (evaluation leaves them out)", NOTE, empty),
    ]


def check(path, names_only=False, size=None, num_workers=2):
    """Folder or text file -> the report: a dict of counts and Findings (all of them, also the empty ones)."""
    path, began = Path(path), time.monotonic()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    is_folder = path.is_dir()
    database, queries, others = list_folder(path) if is_folder else list_file(path)
    findings, sizes = [], {}
    database_names, wrong = parse_names(database)
    query_names, also_wrong = parse_names(queries)
    findings += [Finding(wrong[0].what, PROBLEM, wrong[0].items + also_wrong[0].items)]
    findings += check_database(database_names) + check_queries(query_names)
    if is_folder and queries:
        findings += check_positives(path, database, queries)
    findings.append(Finding("files that are no image (left by a build that was stopped, if .tmp)", NOTE, others))
    if is_folder and not names_only:
        more, sizes = check_images(path, database, queries, size, num_workers)
        findings += more
    years = Counter(query_names.years.tolist())
    return {
        "path": str(path),
        "database": len(database),
        "queries": len(queries),
        "zooms": count_zooms(database_names),
        "query_years": dict(sorted(years.items())),
        "sizes": sizes,
        "images_read": is_folder and not names_only,
        "seconds": round(time.monotonic() - began, 2),
        "findings": findings,
    }


def problems(report):
    return sum(len(finding.items) for finding in report["findings"] if finding.level == PROBLEM)


def to_text(report, show=3):
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


def to_json(report):
    findings = [
        {"what": finding.what, "level": finding.level, "count": len(finding.items), "items": finding.items}
        for finding in report["findings"]
        if finding.items
    ]
    return json.dumps({**report, "problems": problems(report), "findings": findings}, indent=1, ensure_ascii=False)


def add_command(commands, formatter):
    parser = commands.add_parser(
        "check", help="what is in a data set, and what is wrong with it", formatter_class=formatter
    )
    parser.add_argument("path", type=Path, help="folder of a data set, or a text file of names, one a line")
    parser.add_argument("--names_only", action="store_true", help="read no image")
    parser.add_argument("--image_size", type=positive, help="side of a database image; default: what most of them have")
    parser.add_argument("--num_workers", type=whole, default=os.cpu_count(), help="threads that read images")
    parser.add_argument("--show", type=whole, default=3, help="items printed of each finding")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the whole report")
    parser.set_defaults(command_main=main)


def main(args):
    """-> exit code."""
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image_size {args.image_size}: expected 1 or more")
    if args.json and not args.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: its folder does not exist; make it first")
    report = check(args.path, args.names_only, args.image_size, args.num_workers)
    print(to_text(report, max(args.show, 0)))
    if args.json:
        args.json.write_text(to_json(report))
    return 1 if problems(report) else 0
