"""A family on disk: one JSON for each member, and safetensors files in which no tensor is stored twice.

`family.json` says what is common to all: task, labels, metric, shapes. `<name>.json` holds a member's structure, its
measurements, and for each weight the file and key it lies at, which may be another member's file. Every file appears
whole or not at all, so that a killed run leaves the members that it had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrain.compression import structured
from adaptrain.errors import ConfigurationError
from adaptrain.execution.oom import is_out_of_memory
from adaptrain.pruning import cost
from adaptrain.pruning.families import find_family
from adaptrain.pruning.family import Match

FOLDER = "family"  # in a run's folder
ABOUT_FILE = "family.json"
TOKENIZER = "tokenizer"
_FORMAT = 1

_Place = tuple[str, str, torch.device]  # of a tensor: file, key, and the device it is loaded to


class FamilyStore:
    """Reads and writes the members of one run.

    Args:
        folder: The family's folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def begin(self) -> None:
        """Makes the folder for a new run; an earlier run's stays beside it as `family.1`, `family.2`, ..."""
        if self.folder.exists():
            number = 1
            while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
                number += 1
            self.folder.rename(aside)
        self.folder.mkdir(parents=True)

    def write_about(self, about: Mapping[str, Any]) -> None:
        """Writes what all members share."""
        _write_json(self.folder / ABOUT_FILE, {"format": _FORMAT, **about})

    def about(self) -> dict[str, Any]:
        """Reads what all members share.

        Raises:
            ConfigurationError: There is no family, or another version wrote it.
        """
        path = self.folder / ABOUT_FILE
        if not path.is_file():
            raise ConfigurationError(
                f"There is no family of models in {self.folder}: it has no {ABOUT_FILE}. A run leaves one with the"
                " callback FamilyCheckpoint: python train.py +experiment=model_family, or callbacks/family in another."
            )
        about = _read_json(path)
        if about.get("format") != _FORMAT:
            raise ConfigurationError(
                f"{path} is of format {about.get('format')!r}, this version of adaptrain reads {_FORMAT}. Read it with"
                " the version that wrote it."
            )
        return about

    def members(self) -> list[dict[str, Any]]:
        """Reads what is known of each member, in the order they were taken."""
        paths = [path for path in self.folder.glob("*.json") if path.name != ABOUT_FILE]
        return sorted((_read_json(path) for path in paths), key=lambda member: member["number"])

    def keep(self, names: Iterable[str]) -> None:
        """Removes all members but the named ones, as a resumed run does: it takes the others again.

        Raises:
            ConfigurationError: One that is to be kept is not there.
        """
        known = {member["name"] for member in self.members()}
        if missing := sorted(set(names) - known):
            raise ConfigurationError(
                f"The run is to go on with the members {', '.join(missing)} of its family, but {self.folder} does not"
                " hold them. Bring the folder back, or begin anew."
            )
        for name in known - set(names):
            (self.folder / f"{name}.json").unlink()
        self._remove_unused()

    def add(self, match: Match, *, name: str, step: int, inside: str | None = None) -> dict[str, Any]:
        """Writes the model as it is now as a member; tensors that another member has as well are not written again.

        Args:
            match: The model.
            name: The member's name; a member of that name is replaced.
            step: The optimizer step.
            inside: The member whose tensors begin with those of the model: they are not written again either.

        Returns:
            What is known of the member.
        """
        before = [member for member in self.members() if member["name"] != name]
        member = {
            "name": name,
            "number": 1 + max((other["number"] for other in before), default=0),
            "step": step,
            "params": cost.count_params(match.model),
            "size_bytes": cost.size_on_disk_bytes(match.model),
            "metrics": {},
            "costs": {},
            **structured.describe(match),
            "weights": self._write_weights(match.model, f"{name}.safetensors", before, inside),
        }
        _write_json(self.folder / f"{name}.json", member)
        self._remove_unused()
        return member

    def replace_weights(self, name: str, match: Match, **values: Any) -> None:
        """Gives a member other weights of the same shapes, and other values."""
        members = {member["name"]: member for member in self.members()}
        taken = {place["file"] for member in members.values() for place in member["weights"].values()}
        number = 2
        while (file := f"{name}.{number}.safetensors") in taken:
            number += 1
        weights = self._write_weights(match.model, file, members.values())
        _write_json(self.folder / f"{name}.json", members[name] | values | {"weights": weights})
        self._remove_unused()

    def update(self, name: str, **values: Any) -> None:
        """Notes values of a member."""
        path = self.folder / f"{name}.json"
        _write_json(path, _read_json(path) | values)

    def rebuild(
        self,
        member: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        build: Callable[[], nn.Module] | None = None,
        loaded: MutableMapping[Any, Tensor] | None = None,
    ) -> Any:
        """Returns a member's model, in evaluation mode and frozen.

        Args:
            member: What is known of the member.
            device: Where its weights go.
            build: Builds the dense model, for one that is not of transformers.
            loaded: The tensors that are in memory, by place: those are shared, and what is loaded is added. It may
                hold them weakly, the model keeps them alive. None: nothing is shared.
        """
        if build is None and member["config"] is None:
            raise ConfigurationError(
                f"The family in {self.folder} is of {member['class']}, which is not of transformers: say how to build"
                " the dense model, ModelFamily.load(run_dir, build=lambda: MyModel(...))."
            )
        device = torch.device(device)
        places = member["weights"]
        tensors = self._load({(place["file"], place["key"], device) for place in places.values()}, loaded)
        dense = None if build is None else build()
        model = structured.rebuild(member, where=self.folder, model=dense).requires_grad_(False).eval()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tied: dict[int, nn.Parameter] = {}
        state: dict[str, Tensor] = {}
        for name, place in places.items():
            tensor = tensors[place["file"], place["key"], device]
            if "shape" in place:
                tensor = tensor[tuple(slice(size) for size in place["shape"])]
            if name in parameters:  # tied ones stay one Parameter
                tensor = tied.setdefault(id(parameters[name]), nn.Parameter(tensor, requires_grad=False))
            state[name] = tensor
        find_family(model).model.load_state_dict(state, assign=True)
        model._adaptrain_tensors = tuple(tensors.values())
        return model.to(device)  # buffers that are not saved

    def stored_bytes(self) -> int:
        """Returns the bytes of all weights on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _write_weights(
        self, model: nn.Module, file: str, others: Iterable[Mapping[str, Any]], inside: str | None = None
    ) -> dict[str, Any]:
        from safetensors.torch import save_file

        others = list(others)
        larger = next((other["weights"] for other in others if other["name"] == inside), {})
        whole: dict[_Place, Tensor] = {}
        known = {place["hash"]: place for other in others for place in other["weights"].values()}
        weights: dict[str, Any] = {}
        new: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            tensor = tensor.detach().cpu().contiguous()
            digest = _hash(tensor)
            if digest not in known and name in larger and "shape" not in larger[name]:
                place = (larger[name]["file"], larger[name]["key"], torch.device("cpu"))
                if _is_beginning(tensor, self._load({place}, whole)[place]):
                    known[digest] = larger[name] | {"hash": digest, "shape": list(tensor.shape)}
            if digest not in known:
                known[digest] = {"file": file, "key": name, "hash": digest}
                new[name] = tensor
            weights[name] = known[digest]
        if new:
            partial = self.folder / f"{file}.partial"
            save_file(_apart(new), str(partial), metadata={"format": "pt"})
            partial.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets the owner alone read it
            partial.replace(self.folder / file)
        return weights

    def _load(self, wanted: set[_Place], loaded: MutableMapping[Any, Tensor] | None) -> dict[_Place, Tensor]:
        found = {} if loaded is None else {place: loaded[place] for place in wanted if place in loaded}
        missing = wanted - set(found)
        for file in sorted({place[0] for place in missing}):
            places = {place[1]: place for place in missing if place[0] == file}
            for key, tensor in self._read(file, sorted(places)).items():
                found[places[key]] = tensor.to(places[key][2])
        if loaded is not None:
            loaded.update(found)
        return found

    def _read(self, file: str, keys: list[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        try:
            with safe_open(str(self.folder / file), framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in keys}
        except Exception as error:  # missing, cut short, or of something else: each raises its own
            if is_out_of_memory(error):
                raise
            raise ConfigurationError(
                f"{self.folder / file}, which holds weights of the family, cannot be read: {error}"
            ) from error

    def _remove_unused(self) -> None:
        """Removes the files that no member refers to."""
        used = {place["file"] for member in self.members() for place in member["weights"].values()}
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.partial")):
            if path.name not in used:
                path.unlink()


def _hash(tensor: Tensor) -> str:
    """Tells two tensors apart by dtype, shape and every bit."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies what shares memory with another, which safetensors refuses; a copy of everything might not fit."""
    held = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if held[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }


def _is_beginning(part: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is what another begins with, in each dimension."""
    if part.dtype != whole.dtype or part.dim() != whole.dim() or part.numel() == 0:
        return False
    fits = all(ours <= theirs for ours, theirs in zip(part.shape, whole.shape, strict=True))
    return fits and torch.equal(part, whole[tuple(slice(size) for size in part.shape)])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is not what adaptrain writes: {error}.") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
