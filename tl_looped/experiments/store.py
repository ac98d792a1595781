"""Results on disk: whole or not there, and never overwritten by another format.

A dataset is turned into netCDF in memory and then written like any file: beside its place, flushed
to the disk, renamed. HDF5 itself cannot be trusted with a full disk (it may crash the process on
closing the file). Every file carries a checksum, see ``tl_looped.experiments.sealing``. A file that
cannot be used, because it is damaged, of another format or of another run, is an error for those
who read it and is set aside by those who write.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tl_looped.errors import DataError
from tl_looped.experiments.sealing import opened, sealed
from tl_looped.files import is_file, is_folder, make_folder, write_bytes

FORMAT = 1
"""Version of the result files; another one means that their variables mean something else."""

RESULTS = "results.nc"
SPEC_FILE = "spec.toml"
PARTS = "parts"
PART_SUFFIX = ".npz"
_NAMED = re.compile(r"_r[0-9]+_([0-9a-f]{8})$")
ASIDE = "set-aside"
"""Folder of a run for parts and records that could not be used."""


def write_dataset(data: xr.Dataset, path: Path) -> Path:
    """Write a dataset as compressed netCDF, with the format's version in its attributes.

    The file gets a checksum, unless the dataset was read from one that had none.

    Raises:
        DataError: as :func:`write_bytes`.
    """
    numbers = {name: {"zlib": True} for name, v in data.items() if _is_array_of_numbers(v)}
    data = data.assign_attrs({key: _plain(value) for key, value in data.attrs.items()})
    content: Any = data.assign_attrs(format=FORMAT).to_netcdf(engine="h5netcdf", encoding=numbers)
    return write_bytes(sealed(content) if has_checksum(data) else content, path)


def has_checksum(data: xr.Dataset) -> bool:
    """Whether a dataset is as it was written: False if its file had no checksum to tell it by."""
    return bool(data.encoding.get("checksum", True))


def _plain(value: Any) -> Any:
    """An attribute as HDF5 takes it: no subclass of str, such as PyTorch's version is, no bool."""
    if isinstance(value, str):
        return str.__str__(value)
    return int(value) if isinstance(value, (bool, np.bool_)) else value


def _is_array_of_numbers(values: xr.DataArray) -> bool:
    return values.ndim > 0 and values.size > 0 and np.issubdtype(values.dtype, np.number)


def read_dataset(path: Path) -> xr.Dataset:
    """Read what :func:`write_dataset` wrote, into memory; see also :func:`has_checksum`.

    Raises:
        DataError: if there is no file, if it is damaged, or of another format.
    """
    if not is_file(path):
        raise DataError(f"there is no {path}: run the experiment first (tl-looped analyze)")
    checked = False
    try:
        content, checked = opened(path.read_bytes())
        data = xr.load_dataset(io.BytesIO(content), engine="h5netcdf")
    except Exception as error:  # h5py and h5netcdf raise a dozen kinds for a damaged file
        if checked and isinstance(error, MemoryError):
            raise
        raise DataError(
            f"{path} cannot be read as netCDF ({type(error).__name__}: {error}). Is it damaged or "
            "cut off? Run the experiment again"
        ) from error
    data.encoding["checksum"] = checked
    found: Any = data.attrs.get("format")
    if np.ndim(found) or not np.issubdtype(np.asarray(found).dtype, np.integer):
        raise DataError(f"{path} has no integer attribute 'format': not written by an experiment")
    if int(found) != FORMAT:
        raise DataError(
            f"{path} is of format {int(found)}, and this version reads format {FORMAT}: use the "
            f"version that wrote it ({data.attrs.get('tl_looped', 'unknown')}), or run the "
            "experiment again, which keeps the old file beside the new one"
        )
    return data


def write_part(data: xr.Dataset, path: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write a batch's results as ``.npz``: the arrays, and a description as JSON.

    A netCDF file of a few numbers takes as long as many prompts of a small model.

    Args:
        data: The results.
        path: Where to.
        record: What else the description holds, plain values: which run the part is of.

    Raises:
        DataError: as :func:`write_bytes`.
    """
    attributes = {key: _plain(value) for key, value in data.attrs.items()}
    about: dict[str, Any] = {
        "format": FORMAT,
        "attrs": attributes,
        "variables": {},
        "record": dict(record or {}),
    }
    arrays: dict[str, Any] = {}
    for n, (name, values) in enumerate(data.variables.items()):
        arrays[f"v{n}"] = values.values
        is_coordinate = name in data.coords
        about["variables"][f"v{n}"] = [str(name), list(values.dims), values.attrs, is_coordinate]
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(about)), **arrays)
    return write_bytes(sealed(content.getbuffer()), path)


def read_part(path: Path) -> xr.Dataset:
    """Read what :func:`write_part` wrote; no pickle is opened. See also :func:`has_checksum`.

    Raises:
        DataError: if it is damaged or of another format.
    """
    return read_part_and_record(path)[0]


def read_part_and_record(path: Path) -> tuple[xr.Dataset, dict[str, Any]]:
    """A part, and the record that it was written with; empty if there was none.

    Raises:
        DataError: as :func:`read_part`.
    """
    checked = False
    try:
        content, checked = opened(path.read_bytes())
        # From memory: numpy leaves the file open where it is damaged.
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT}")
            found: dict[bool, dict[str, Any]] = {True: {}, False: {}}
            for key, (name, dims, attributes, is_coordinate) in about["variables"].items():
                found[is_coordinate][name] = (dims, file[key], attributes)
        data = xr.Dataset(found[False], found[True], about["attrs"])
        record = dict(about.get("record", {}))
    except Exception as error:  # zipfile, zlib, numpy and xarray raise a dozen kinds
        if checked and isinstance(error, MemoryError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    data.encoding["checksum"] = checked
    return data, record


def read_if_usable(path: Path, digest: str) -> tuple[xr.Dataset | None, str]:
    """The results of a run if they are there, can be read and are its own; and why not.

    Args:
        path: The file.
        digest: The run's hash.
    """
    if not path.exists():
        return None, ""
    try:
        data = read_dataset(path)
    except DataError as error:
        return None, str(error)
    if (found := str(data.attrs.get("hash"))) != digest:
        return None, (
            f"{path} holds the results of another run (its hash is {found[:16]}, this run's "
            f"{digest[:16]})"
        )
    return data, ""


def read_run(path: Path) -> xr.Dataset:
    """The ``results.nc`` in a run's folder; see :func:`read_dataset`.

    Raises:
        DataError: as :func:`read_dataset`, and if the folder is named for another run's hash.
    """
    data = read_dataset(path)
    named, found = _NAMED.search(path.parent.resolve().name), data.attrs.get("hash")
    if named and found is not None and not str(found).startswith(named[1]):
        raise DataError(
            f"{path} holds the results of another run: its hash begins with {str(found)[:8]}, its "
            f"folder's name ends with {named[1]}. Run the experiment again, or rename the folder"
        )
    return data


def no_checksum_notice(name: str) -> str:
    """The notice of results for which :func:`has_checksum` is False."""
    return (
        f"{name} has no checksum: an earlier version or another program wrote it, and whether it "
        "has changed since cannot be told"
    )


def set_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename a file that cannot be used to ``NAME.old-N.SUFFIX``; nothing is lost.

    Args:
        path: The file.
        folder: Where it goes; it stays where it is if None.

    Raises:
        DataError: if it cannot be renamed.
    """
    folder = path.parent if folder is None else make_folder(folder)
    n = 1
    while (kept := folder / f"{path.stem}.old-{n}{path.suffix}").exists():
        n += 1
    try:
        os.replace(path, kept)
    except OSError as error:
        raise DataError(f"{path} cannot be used, and not be set aside either: {error}") from error
    return kept


def find_runs(folder: Path) -> list[Path]:
    """Folders of finished runs: the folder itself, or those in it, by name.

    Raises:
        DataError: if there is none.
    """
    if is_file(folder / RESULTS):
        return [folder]
    found = sorted(p.parent for p in folder.glob(f"*/{RESULTS}")) if is_folder(folder) else []
    if not found:
        raise DataError(f"{folder} holds no finished run (no {RESULTS} in it or one level below)")
    return found
