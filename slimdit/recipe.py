"""A recipe: a model and the methods to apply to it in order, read from a small TOML file.

    name = "lean"
    model = "bundled"
    methods = [
      {reduce_steps = {steps = 10, solver = "unipc"}},
      {quantize = {weights = "int8"}},
    ]
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from .context import Context, Refused
from .files import read_kept, write_json, write_text
from .methods import METHODS, Method
from .strict import build, convert, nearest, parse_toml, read_text

if TYPE_CHECKING:
    from .models.dit import DiT, DiTConfig
    from .pipeline import Pipeline

SHIPPED = Path(__file__).parent / "assets" / "recipes"
DONE = "done.json"  # written last into a method's folder: with it, the folder is whole


@dataclass(frozen=True)
class Recipe:
    """Methods in order.

    Attributes:
        model: what the recipe is for: a path, `"bundled"` or a Hub id.
        description: what it shows, in a sentence.
        controls: names of recipes that a bench compares it with, image by image; nothing it makes depends on them.

    Raises:
        ValueError: the name is not fit for a file, something is not a method, or it is its own control.
    """

    name: str
    methods: tuple[Method, ...]
    model: str = "bundled"
    description: str = ""
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name in self.controls:
            raise ValueError(f"recipe: {self.name} cannot be its own control: name other recipes")
        if not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise ValueError(f"recipe: name {self.name!r} must be letters, digits, '.', '-' and '_', as a file's name")
        for method in self.methods:
            method_name(method)

    def reseeded(self, number: int) -> Recipe | None:
        """The recipe with other random draws, compared with itself and with its controls' of the same number.

        Every method that has a seed gets one higher by `number`. None where none has one: nothing would change.
        """
        if not any(map(has_seed, self.methods)):
            return None
        methods = tuple(replace(method, seed=(method.seed or 0) + number)  # type: ignore
                        if has_seed(method) else method for method in self.methods)
        controls = (self.name, *(f"{name}-seed{number}" for name in self.controls))
        return replace(self, name=f"{self.name}-seed{number}", methods=methods, controls=controls)

    def summary(self) -> str:
        """The methods in a line, with the options that are not their defaults."""
        def told(method: Method) -> str:
            chosen = [f"{field.name}={getattr(method, field.name)!r}" for field in fields(method)  # type: ignore[arg-type]
                      if getattr(method, field.name) != field.default]
            return f"{method_name(method)}({', '.join(chosen)})"

        return ", then ".join(map(told, self.methods)) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON can hold it, every default spelled out."""
        return {"name": self.name, "model": self.model, "description": self.description,
                **({"controls": list(self.controls)} if self.controls else {}),
                "methods": [{method_name(method): options(method)} for method in self.methods]}

    def to_toml(self) -> str:
        """The recipe as a file that `read` reads back, defaults spelled out; an option that is None is left out."""
        lines = [f"name = {_toml(self.name)}", f"model = {_toml(self.model)}"]
        if self.description:
            lines.append(f"description = {_toml(self.description)}")
        if self.controls:
            lines.append(f"controls = {_toml(list(self.controls))}")
        entries = [f"  {{{method_name(method)} = {_toml(options(method))}}},\n" for method in self.methods]
        return "\n".join(lines) + "\nmethods = [\n" + "".join(entries) + "]\n"


def read(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        ValueError: the file is not TOML, or names something unknown, or gives a value of the wrong type; the sentence
            has the file, the line and the nearest right name.
    """
    return parse(read_text(path), str(path))


def parse(text: str, where: str = "recipe") -> Recipe:
    """The recipe in a text; `where` is what errors call it.

    Raises:
        ValueError: as `read`.
    """
    data = parse_toml(text, where)
    allowed = [field.name for field in fields(Recipe)]
    for key in data:
        if key not in allowed:
            raise ValueError(f"{where}:{_line(text, [key])}: {key!r} is unknown; {nearest(key, allowed)}")
    for key in ("name", "model", "description"):
        if not isinstance(data.get(key, ""), str):
            raise ValueError(f"{where}:{_line(text, [key])}: {key} must be a text, not {data[key]!r}")
    for key in ("name", "methods"):
        if key not in data:
            raise ValueError(f"{where} has no {key}: add a line that begins with `{key} =`")
    if not isinstance(data["methods"], list):
        raise ValueError(f"{where}:{_line(text, ['methods'])}: methods must be a list of {{method = {{options}}}}")
    controls = data.get("controls", [])
    if not isinstance(controls, list) or not all(isinstance(name, str) for name in controls):
        raise ValueError(f"{where}:{_line(text, ['controls'])}: controls must be a list of recipes' names, not "
                         f"{controls!r}")
    methods = tuple(_methods(data["methods"], text, where))
    try:
        return Recipe(**{**data, "methods": methods, "controls": tuple(controls)})
    except ValueError as error:
        raise ValueError(f"{where}:{_line(text, ['name'])}: {error}") from error


def find(name: str) -> Recipe:
    """The recipe of a file, or the shipped one of that name.

    Raises:
        ValueError: there is no such recipe, or `read` refuses it.
    """
    path = shipped().get(name) or Path(name)
    if not path.is_file():
        raise ValueError(f"recipe {name!r} is neither a file nor shipped; {nearest(name, shipped())}")
    return read(path)


def shipped() -> dict[str, Path]:
    """The recipes that come with slimdit, by name."""
    return {path.stem: path for path in sorted(SHIPPED.rglob("*.toml"), key=lambda path: path.stem)}


def tour() -> dict[str, Path]:
    """The shipped recipes that a bench runs when none is named: minutes, not hours."""
    return {name: path for name, path in shipped().items() if path.parent == SHIPPED}


def method_name(method: Method) -> str:
    """The name that `METHODS` has for a method.

    Raises:
        ValueError: it has none.
    """
    for name, kind in METHODS.items():
        if type(method) is kind:
            return name
    raise ValueError(f"recipe: {method!r} is not a method; use one of {', '.join(METHODS)}")


def options(method: Method) -> dict[str, Any]:
    """A method's options as JSON and TOML can hold them, those that are None left out."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}  # type: ignore[arg-type]
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items() if value is not None}


def has_seed(method: Method) -> bool:
    """Whether a method is told its seed, and not only the run's."""
    return any(field.name == "seed" for field in fields(method))  # type: ignore[arg-type]


def run(recipe: Recipe, pipeline: Pipeline, context: Context, *, resume: bool = False) -> Pipeline:
    """Apply a recipe to a copy of `pipeline`, which is not changed itself, and save the result in `context.folder`.

    After each method the folder gets another, such as `01-quantize`: the model so far, and in `done.json` the methods,
    their options and what the last one changed. With `resume`, goes on after the last whole one; a method that trains
    goes on by itself from what it left there. What the methods changed is added to `context.witnesses`.

    Raises:
        Refused: a method cannot be applied; the sentence says what to do instead.
        FileExistsError: the folder holds a run and `resume` is False.
        ValueError: the folder holds a run of another recipe, model or seed.
    """
    start = _Start(fingerprint(pipeline), context.seed)
    current, done = pipeline.copy(), 0
    if any(context.folder.glob(f"*/{DONE}")):
        if not resume:
            raise FileExistsError(f"{context.folder} holds a recipe's run: add --resume to go on with it, or name "
                                  "another folder")
        current, done = _resumed(recipe, current, context, start)
    for number, method in list(enumerate(recipe.methods, 1))[done:]:
        context.report(f"{number}/{len(recipe.methods)} {method_name(method)}")
        folder, began = _folder(context, number, method), time.monotonic()
        current = apply(method, current, replace(context, teacher=pipeline, folder=folder))
        # A method that trains says how long it trained, in however many sittings.
        context.witnesses[-1].setdefault("seconds", time.monotonic() - began)
        _save_into(folder, current)
        write_json(folder / DONE, start.marker(recipe, number) | {"witness": context.witnesses[-1]})
    _save_result(current, recipe, context.folder)
    return current


def apply(method: Method, pipeline: Pipeline, context: Context) -> Pipeline:
    """One method, entered in the pipeline's history; `context.witnesses` gets one entry, with the method's name."""
    inside = replace(context, witnesses=[])
    changed = method.apply(pipeline, inside)
    facts = {name: value for entry in inside.witnesses for name, value in entry.items()}
    context.witnesses.append({"method": method_name(method), **facts})
    return changed.replace(history=(*pipeline.history, {method_name(method): options(method)}))


def check(recipe: Recipe, target: Pipeline | DiTConfig) -> list[dict[str, Any]]:
    """What each method of a recipe changes in the tiny twin of a model, which `rehearse` runs in seconds.

    Raises:
        Refused, ValueError: as `rehearse`.
    """
    return rehearse(recipe, target)[1]


def rehearse(recipe: Recipe, target: Pipeline | DiTConfig) -> tuple[Pipeline, list[dict[str, Any]]]:
    """Apply a recipe to the tiny twin of a model, with random weights, and sample two images.

    Whatever a rule would refuse is refused here. The compiler itself is not run; it changes no shapes.

    Returns:
        The twin after the recipe, and the methods' witnesses.

    Raises:
        Refused: a method cannot be applied; the sentence says what to do instead.
        ValueError: the model no longer has the names and shapes of its config, or its output is not finite.
    """
    import torch

    start = _twin(target)
    current = start.copy()
    witnesses: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, method in enumerate(recipe.methods, 1):
            current = apply(method, current, Context(start, Path(folder) / str(number), rehearsal=True,
                                                     witnesses=witnesses))
    if mismatch := config_mismatch(current.model):
        raise ValueError(f"recipe {recipe.name}: {mismatch}")
    plain = current.replace(runtime=replace(current.runtime, compile=False))
    config, zero = plain.model.config, torch.zeros(1, dtype=torch.int64)
    if not plain.denoise(torch.ones(1, config.channels, *config.input_size), zero, zero).isfinite().all():
        raise ValueError(f"recipe {recipe.name}: the output of the model is not finite")
    plain.sample([0, 1], batch=2)
    return current, witnesses


def applicable(name: str, pipeline: Pipeline) -> str:
    """Whether a method, with its defaults, can be applied to a pipeline: "yes", or the sentence that refuses it."""
    try:
        check(Recipe(name, (METHODS[name](),)), pipeline)
    except Refused as refusal:
        return str(refusal)
    return "yes"


def config_mismatch(model: DiT) -> str:
    """How a model differs from what its config says, as a half sentence; empty where it does not."""
    import torch

    from .models.dit import DiT

    with torch.device("meta"):
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in DiT(model.config).state_dict().items()}
    actual = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    names = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    return f"the model has {names[0]} other than its config says" if names else ""


def fingerprint(pipeline: Pipeline) -> str:
    """A hash of everything that decides a pipeline's images but the autoencoder."""
    return pipeline.fingerprint()


@dataclass(frozen=True)
class _Start:
    """What a run began with, so that it is not resumed with something else."""

    fingerprint: str
    seed: int

    def marker(self, recipe: Recipe, number: int) -> dict[str, Any]:
        """What tells the state after the first `number` methods of a recipe from any other."""
        applied = [[method_name(method), options(method)] for method in recipe.methods[:number]]
        return {"start": self.fingerprint, "seed": self.seed, "methods": applied}


def _resumed(recipe: Recipe, pipeline: Pipeline, context: Context, start: _Start) -> tuple[Pipeline, int]:
    """The pipeline after the last whole folder, and how many methods that is."""
    from .formats import load

    done = 0
    for number, method in enumerate(recipe.methods, 1):
        marker = _folder(context, number, method) / DONE
        if not marker.exists():
            break
        found, expected = read_kept(marker, dict, ["witness"]), start.marker(recipe, number)
        if any(found.get(key) != value for key, value in expected.items()):
            raise ValueError(f"{marker.parent} is of another recipe, model or seed: use the ones it began with, or "
                             "another folder")
        context.witnesses.append(found["witness"])
        done = number
    if not done:
        raise ValueError(f"{context.folder} holds another recipe's run: name another folder")
    loaded = load(str(_folder(context, done, recipe.methods[done - 1])))
    return pipeline.replace(model=loaded.model.to(pipeline.device), sampling=loaded.sampling, runtime=loaded.runtime,
                            history=loaded.history), done


def _save_result(pipeline: Pipeline, recipe: Recipe, folder: Path) -> None:
    """The model and its recipe in a folder that holds the states on the way as well."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.toml", recipe.to_toml())
    _save_into(folder, pipeline)


def _save_into(folder: Path, pipeline: Pipeline) -> None:
    """A model in a folder that may hold other folders: the states on the way, or what a method wrote."""
    from .formats import save

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:
        save(pipeline, Path(beside) / "model")
        # The config last: a folder with one is a whole model.
        for file in sorted(Path(beside, "model").iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)


def _folder(context: Context, number: int, method: Method) -> Path:
    return context.folder / f"{number:02d}-{method_name(method)}"


def _twin(target: Pipeline | DiTConfig) -> Pipeline:
    """The tiny twin of a pipeline or config on the CPU, in pixel space, every weight random."""
    import torch

    from .models.autoencoder import PixelSpace
    from .models.dit import DiT, DiTConfig, twin
    from .models.surgery import pack_linears
    from .pipeline import Pipeline
    from .sampling.seeds import seeded

    pipeline = None if isinstance(target, DiTConfig) else target
    config = target if isinstance(target, DiTConfig) else target.model.config
    small = twin(config)
    model = DiT(replace(small, linears={})).eval()
    generator = seeded(0, "twin")
    with torch.no_grad():
        for parameter in model.parameters():
            # The paper's initialisation makes every block silent, and a silent block hides what a method does.
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    pack_linears(model, small.linears)
    return pipeline.replace(model=model, autoencoder=PixelSpace()) if pipeline else Pipeline(model)


def _methods(entries: list[Any], text: str, where: str) -> Iterable[Method]:
    """The methods of a list of one-entry tables."""
    above: list[str] = ["methods"]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(f"{where}:{_line(text, above)}: entry {number} of methods must be one "
                             f"{{method = {{options}}}}, not {entry!r}")
        (name, values), = entry.items()
        above = [*above, name]
        if name not in METHODS:
            raise ValueError(f"{where}:{_line(text, above)}: method {name!r} is unknown; {nearest(name, METHODS)}")
        faulty = _faulty(METHODS[name], values)
        yield build(METHODS[name], values, f"{where}:{_line(text, [*above, *faulty])}: {name}")


def _faulty(kind: Callable[..., Any], values: Any) -> list[str]:
    """The first option with an unknown name or a value of the wrong type, if any."""
    hints = get_type_hints(kind)
    for name, value in values.items() if isinstance(values, dict) else ():
        try:
            convert(value, hints[name], name)
        except (KeyError, ValueError):
            return [name]
    return []


def _line(text: str, keys: list[str]) -> int:
    """The line of the last of these keys, each looked for after the one before; comments do not count."""
    visible = re.sub(r'("(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')|#[^\n]*',
                     lambda match: match[1] or " " * len(match[0]), text)
    position = 0
    for key in keys:
        found = re.compile(rf"(?<![\w-])[\"']?{re.escape(key)}[\"']?\s*[=.\]]").search(visible, position)
        position = found.end() - 1 if found else position
    return text.count("\n", 0, position) + 1


def _toml(value: Any) -> str:
    """A value as TOML writes it inline."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
