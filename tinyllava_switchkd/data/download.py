"""Download the training data: ``python -m tinyllava_switchkd.data.download pretrain|finetune``.

LLaVA-558K (pre-training) and LLaVA-Mix-665K (fine-tuning) in TinyLLaVA's folders (its docs, "Prepare Datasets")::

    DATA_DIR/text_files/blip_laion_cc_sbu_558k.json      DATA_DIR/llava/llava_pretrain/images/
    DATA_DIR/text_files/llava_v1_5_mix665k.json          DATA_DIR/{coco/train2017,gqa/images,ocr_vqa/images,...}

Interrupted downloads continue. Only images that the JSON names are unpacked, and at the end all of them must exist and
decode. The command may be run again at any time and then does only what is missing.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.data.image_files import image_problem
from tinyllava_switchkd.data.records import images_of, scan
from tinyllava_switchkd.fetch import SourceError, download_into, extract, hub_folder
from tinyllava_switchkd.io import atomic_file, write_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """A LLaVA JSON and the sources of its images; a file is a URL or, on the hub, ``owner/data set/name``.

    Attributes:
        title: name for messages.
        json: the JSON file.
        records: number of its records.
        root: folder in the data directory to which the JSON's image names are relative.
        images: folder in `root` -> archives; each is used for images that are missing from earlier ones.
    """

    title: str
    json: str
    records: int
    root: str
    images: Mapping[str, tuple[str, ...]]

    @property
    def path(self) -> str:
        """Path of the JSON in the data directory."""
        return f"text_files/{self.json.rpartition('/')[2]}"


TRAINING_SETS = {
    "pretrain": TrainingSet(
        "LLaVA-558K",
        "liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        558_128,
        "llava/llava_pretrain/images",
        {"": ("liuhaotian/LLaVA-Pretrain/images.zip",)},
    ),
    "finetune": TrainingSet(
        "LLaVA-Mix-665K",
        "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json",
        665_298,
        "",
        {
            "coco/train2017": ("http://images.cocodataset.org/zips/train2017.zip",),
            "gqa/images": ("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",),
            # OCR-VQA's own links are mostly dead (LLaVA #1458, #1618); these are collections made for LLaVA-1.5.
            "ocr_vqa/images": (
                "weizhiwang/llava_v15_instruction_images/ocr_vqa_images_llava_v15.zip",
                "qnguyen3/ocr_vqa/ocr_vqa.zip",
            ),
            "textvqa/train_images": ("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",),
            "vg/VG_100K": ("https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",),
            "vg/VG_100K_2": ("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",),
        },
    ),
}


def get_json(training_set: TrainingSet, data_dir: Path, downloads: Path) -> None:
    """Download the JSON of a training set, unless it exists.

    Raises:
        SourceError: the hub can't be reached or doesn't have it.
    """
    path = data_dir / training_set.path
    if not path.is_file():
        logger.info("%s: getting %s.", training_set.title, training_set.json)
        with open(_get(training_set.json, downloads), "rb") as source, atomic_file(path) as target:
            shutil.copyfileobj(source, target)


def named_images(path: Path, folders: Collection[str]) -> tuple[int, dict[str, list[str]]]:
    """The images that a LLaVA JSON names.

    Returns:
        the number of records, and folder -> names of the images in it.

    Raises:
        ValueError: the file is malformed, or names an image outside the folders.
    """
    names: dict[str, dict[str, None]] = {folder: {} for folder in folders}
    count = 0
    for _, _, record in scan(str(path)):
        for image in images_of(record, f"Record {count} of {path}"):
            folder = next((folder for folder in folders if not folder or image.startswith(f"{folder}/")), None)
            if folder is None or ".." in image.split("/") or image.startswith("/"):
                raise ValueError(f"Record {count} of {path}: the image {image!r} is in none of the known folders.")
            names[folder].setdefault(image.removeprefix(f"{folder}/"))
        count += 1
    return count, {folder: list(found) for folder, found in names.items()}


def get_images(folder: Path, names: Iterable[str], archives: Iterable[str], downloads: Path, keep: bool) -> list[str]:
    """Unpack the named images of a folder that do not exist yet.

    Args:
        archives: as in `TrainingSet`.
        keep: keep the archives even if all images exist.

    Returns:
        the names that are in no archive.

    Raises:
        SourceError: no archive could be downloaded.
        ValueError: an archive is damaged.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    used, problems = [], []
    for archive in archives:
        if not missing:
            break
        logger.info("%s: %d images are missing; getting %s.", folder, len(missing), archive)
        try:
            path = _get(archive, downloads)
        except SourceError as error:
            problems.append(str(error))
            continue
        used.append(path)
        missing = extract(path, {name: folder / name for name in missing})
    if missing and not used:
        raise SourceError(f"{folder}: {'; '.join(problems)}")
    if not missing and not keep:
        for path in used:
            path.unlink(missing_ok=True)
    return missing


def _get(file: str, downloads: Path) -> Path:
    if "://" in file:
        return download_into(downloads, file)
    repo_id, _, name = file.rpartition("/")
    _, folder = hub_folder([repo_id], [name], to=downloads / repo_id.replace("/", "--"))
    if not (folder / name).is_file():
        raise SourceError(f"{repo_id} has no file {name}.")
    return folder / name


def bad_images(paths: Sequence[Path], workers: int) -> list[tuple[Path, str]]:
    """The images that are missing or don't decode, with the reasons, in order."""
    with ThreadPoolExecutor(workers) as pool:
        reasons = tqdm(pool.map(_problem, paths), total=len(paths), unit=" images", desc="decoding", leave=False)
        return [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]


def _problem(path: Path) -> str | None:
    if not path.is_file():
        return "missing"
    problem = image_problem(path)
    return f"doesn't decode: {problem}" if problem else None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.data.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("training_set", choices=tuple(TRAINING_SETS), help="LLaVA-558K or LLaVA-Mix-665K")
    parser.add_argument("--data_dir", type=Path, default=Path("playground/data"), help="data directory (%(default)s)")
    parser.add_argument("--download_dir", type=Path, help="folder for archives (DATA_DIR/.downloads)")
    parser.add_argument("--only", nargs="+", metavar="FOLDER", help="only these folders of images, e.g. coco gqa")
    parser.add_argument("--check", action="store_true", help="download nothing, only check existing files")
    parser.add_argument("--no_decode", action="store_true", help="do not check that existing images decode")
    parser.add_argument("--any_count", action="store_true", help="accept a JSON with another number of records")
    parser.add_argument("--keep_archives", action="store_true", help="keep archives even if all their images exist")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding threads (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, which is 0 if all images exist and decode."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO)
    try:
        return 0 if _run(TRAINING_SETS[arguments.training_set], arguments) else 1
    except KeyboardInterrupt:
        print("Interrupted; run the command again to continue.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(training_set: TrainingSet, arguments: argparse.Namespace) -> bool:
    data_dir = arguments.data_dir
    downloads = arguments.download_dir or data_dir / ".downloads"
    path = data_dir / training_set.path
    if not arguments.check:
        get_json(training_set, data_dir, downloads)
    elif not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; get it with python -m tinyllava_switchkd.data.download {arguments.training_set}."
        )
    folders = training_set.images
    count, names = named_images(path, folders)
    if count != training_set.records and not arguments.any_count:
        raise ValueError(
            f"{path} has {count:,} records, not {training_set.records:,}; delete it and run again, or pass --any_count "
            f"if this is intended."
        )
    print(f"{training_set.title}: {count:,} records in {path}")
    only = tuple(name.rstrip("/") for name in arguments.only or ("",))
    places = {folder: Path(training_set.root, folder).as_posix() for folder in folders}  # as the report names them
    for name in only:
        if not any(place.startswith(name) for place in places.values()):
            raise ValueError(f"There is no folder {name!r} among {', '.join(places.values())} (--only).")
    bad: list[tuple[Path, str]] = []
    for folder, wanted in names.items():
        if not places[folder].startswith(only) or not wanted:
            continue
        place = data_dir / places[folder]
        if not arguments.check:
            try:
                get_images(place, wanted, folders[folder], downloads, arguments.keep_archives)
            except (SourceError, ValueError) as error:  # continue with the other folders
                print(f"error: {error}", file=sys.stderr)
        paths = [place / name for name in wanted]
        if arguments.no_decode:
            found = [(image, "missing") for image in paths if not image.is_file()]
        else:
            found = bad_images(paths, arguments.workers)
        bad += found
        missing = sum(reason == "missing" for _, reason in found)
        broken = f", {len(found) - missing:,} don't decode" if len(found) > missing else ""
        print(f"  {places[folder]:<28} {len(wanted) - len(found):>9,} of {len(wanted):,} images{broken}")
    return _report(bad, path.with_suffix(".bad_images.txt"))


def _report(bad: list[tuple[Path, str]], path: Path) -> bool:
    """Print the first bad images and write all of them to a file; returns whether there were none."""
    if not bad:
        path.unlink(missing_ok=True)
        return True
    write_bytes(path, "".join(f"{image}\t{reason}\n" for image, reason in bad).encode())
    for image, reason in bad[:5]:
        print(f"error: {image} {reason}", file=sys.stderr)
    print(
        f"error: {len(bad):,} images are not usable, see {path}; replace them, or remove their records from the JSON.",
        file=sys.stderr,
    )
    return False


if __name__ == "__main__":
    sys.exit(main())
