"""Folders of Hugging Face diffusers: a DiTPipeline or a bare DiTTransformer2DModel, read and written.

diffusers repeats the timestep and label embedders in every block, splits attention's projection in three, and spaces
its timestep frequencies by another constant than the original DiT (docs/design/0002-diffusers-timesteps.md).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import Part, write_json, write_tensors, write_text
from ..models.autoencoder import Autoencoder, KLAutoencoder, PixelSpace
from ..models.dit import BlockConfig, DiTConfig, TimestepEmbedder, position_embedding, preset_name
from ..pipeline import Pipeline
from ..sampling.process import NoiseProcess
from ..sampling.solvers import Sampling, timesteps
from .native import model_config, pipeline_options, pipeline_values
from .tensors import (
    LARGEST_DEPTH,
    LARGEST_SIDE,
    FormatError,
    Loaded,
    build_model,
    check_tensors,
    read_json,
    read_pickled,
    read_safetensors,
    writing_folder,
)
from .timesteps import DIFFUSERS_SHIFT, Refit, refit

WEIGHTS = "diffusion_pytorch_model"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what facebook/DiT-XL-2-256 still says
BLOCK = "transformer_blocks"
EMBEDDERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
             "y_embedder.embedding_table": "class_embedder.embedding_table"}
OUTSIDE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
           "final_layer.linear": "proj_out_2"}
IN_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2"}
SOLVER_OF = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "DPMSolverMultistepScheduler": "dpmpp_2m",
             "UniPCMultistepScheduler": "unipc"}
SPACINGS = ("leading", "trailing", "linspace")  # those that diffusers has too
UNEQUAL = 1e-4  # deviation of the timestep embedding, relative to its size, above which outputs are not called equal
log = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Whether a path is a folder of diffusers with a DiT in it."""
    config = transformer_folder(path) / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in CLASSES


def transformer_folder(path: Path) -> Path:
    """Where the transformer of a folder is: in it, or the folder itself."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def load(path: Path, *, weights: str = "ema", heads: int | None = None) -> Loaded:
    """The pipeline of a diffusers folder; `weights` and `heads` have nothing to choose here.

    A folder that slimdit wrote comes back whole, with its sampling settings and its own timestep embedder, as long as
    its weights are still those that were written.

    Raises:
        FormatError: a file is missing, damaged, or describes something that is not a DiT of ours.
    """
    folder = transformer_folder(path)
    stored = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in stored:
        part = read_safetensors(file, of_block_0, of_qkv) if file.suffix == ".safetensors" else read_pickled(file)
        if not isinstance(part, Mapping) or not all(isinstance(value, Tensor) for value in part.values()):
            raise FormatError(f"{file} does not hold weights by name: is it a diffusers model?")
        check_tensors(part, file)
        tensors.update(part)
    del part  # so that what `from_diffusers` takes out is held nowhere else
    config = read_config(folder / "config.json", tensors)
    ours = from_diffusers(tensors, config, stored[0])
    if tuple(ours["x_embedder.proj.weight"].shape[:1]) != (config.width,):
        raise FormatError(f"{stored[0]} does not fit its config: its tokens are not {config.width} wide")
    ours["pos_embed"] = position_embedding(config.grid, config.width)[None]
    sidecar, notes = path / "slimdit.json", []
    if sidecar.is_file():
        if read_json(sidecar).get("weights") == digest(stored):
            return restore(path, ours)
        notes.append("slimdit.json was left aside: the weights beside it are no longer those it was written with")
    process, sampling, more = read_scheduler(path / "scheduler" / "scheduler_config.json")
    model, name = build_model(config, ours, stored[0]), preset_name(config) or path.name
    return Loaded(Pipeline(model, sampling, process, find_autoencoder(path), name=name), (*notes, *more))


def of_block_0(name: str) -> str:
    """Block 0's name of an embedder that every block has a copy of; other names as they are."""
    return re.sub(rf"^{BLOCK}\.\d+\.norm1\.emb\.", f"{BLOCK}.0.norm1.emb.", name)


def of_qkv(name: str) -> Part | None:
    """The projection that attention's queries, keys and values are parts of."""
    if found := re.fullmatch(rf"({BLOCK}\.\d+\.attn1\.)to_([qkv])\.(weight|bias)", name):
        return f"{found[1]}to_qkv.{found[3]}", "qkv".index(found[2]), 3
    return None


def weight_files(folder: Path) -> list[Path]:
    """The file of weights, or the shards of one."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
            raise FormatError(f"{index} names files outside its folder or none: refused", 3)
        return [folder / name for name in sorted(set(names.values()))]
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{WEIGHTS}{suffix}").is_file():
            return [folder / f"{WEIGHTS}{suffix}"]
    raise FormatError(f"{folder} has no {WEIGHTS}.safetensors: download the folder with its weights")


def digest(files: list[Path]) -> str:
    """SHA-256 over files, in their order."""
    total = sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2 ** 20):
                total.update(chunk)
    return total.hexdigest()


def read_config(where: Path, tensors: Mapping[str, Tensor]) -> DiTConfig:
    """Our config for a diffusers transformer's.

    Raises:
        FormatError: a size is unusable, or an option is set that DiT has not.
    """
    values = read_json(where)
    fixed = {"norm_type": ("ada_norm_zero", "ada_norm_zero"), "activation_fn": ("gelu-approximate", "gelu-approximate"),
             "attention_bias": (True, True), "norm_elementwise_affine": (False, False)}
    for key, (default, wanted) in fixed.items():
        if values.get(key, default) != wanted:
            raise FormatError(f"{where}: {key} is {values[key]!r} where a DiT has {wanted!r}: this is another model")

    def size(key: str, default: int, most: int = LARGEST_SIDE) -> int:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise FormatError(f"{where}: {key} must be a whole number in 1..{most:,}, not {value!r}", 3)
        return value

    heads, head_dim = size("num_attention_heads", 16), size("attention_head_dim", 72)
    depth = size("num_layers", 28, LARGEST_DEPTH)
    channels, side, classes = size("in_channels", 4), size("sample_size", 32), size("num_embeds_ada_norm", 1000)
    out_channels = size("out_channels", channels)
    if out_channels not in (channels, 2 * channels):
        raise FormatError(f"{where}: out_channels is {out_channels}, neither in_channels nor twice that")
    eps = values.get("norm_eps", 1e-5)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise FormatError(f"{where}: norm_eps must be a number in 0..1, not {eps!r}")
    try:
        return DiTConfig((side, side), channels, classes, size("patch_size", 2), heads * head_dim,
                         (BlockConfig(heads, head_dim, 4 * heads * head_dim),) * depth,
                         learn_sigma=out_channels == 2 * channels, frequency_shift=DIFFUSERS_SHIFT, mlp_norm_eps=eps)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def from_diffusers(left: dict[str, Tensor], config: DiTConfig, path: Path) -> dict[str, Tensor]:
    """The tensors under our names, without positions; refused where the blocks' embedders disagree.

    The given dictionary is emptied on the way, so that joined parts are not held twice.
    """
    left.pop("pos_embed.pos_embed", None)
    try:
        ours = {name: left.pop(theirs) for name, theirs in names(config, block=0)}
        for block in range(len(config.blocks)):
            if block:
                for name, theirs in names(config, block, embedders_only=True):
                    if not torch.equal(left.pop(theirs), ours[name]):
                        raise FormatError(f"{path}: {theirs} differs from block 0's: a DiT has one embedder for all "
                                          f"blocks, so this model was changed in a way that slimdit does not know", 3)
                ours.update((name, left.pop(theirs)) for name, theirs in block_names(block))
            for kind in ("weight", "bias"):
                joined = left.pop(f"{BLOCK}.{block}.attn1.to_qkv.{kind}", None)
                if joined is None:  # they are in several files, or in a pickled one
                    joined = torch.cat([left.pop(f"{BLOCK}.{block}.attn1.to_{part}.{kind}") for part in "qkv"])
                ours[f"blocks.{block}.attn.qkv.{kind}"] = joined
    except KeyError as error:
        raise FormatError(f"{path} does not fit its config: {error.args[0]} is missing") from error
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"{path}: the parts of attention do not fit together ({error})") from error
    if left:
        raise FormatError(f"{path} does not fit its config: unexpected {', '.join(sorted(left)[:3])}")
    return ours


def to_diffusers(tensors: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, the embedders once per block."""
    theirs: dict[str, Tensor] = {}
    for block in range(len(config.blocks)):
        pairs = names(config, 0) if block == 0 else [*names(config, block, embedders_only=True), *block_names(block)]
        theirs.update((target, tensors[name].clone()) for name, target in pairs)
        for kind in ("weight", "bias"):
            parts = tensors[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            theirs.update({f"{BLOCK}.{block}.attn1.to_{part}.{kind}": own.clone() for part, own in zip("qkv", parts)})
    return theirs


def names(config: DiTConfig, block: int, embedders_only: bool = False) -> Iterator[tuple[str, str]]:
    """Our name and diffusers' for a block's copy of the embedders; else also what stands once, and the block itself."""
    for ours, theirs in EMBEDDERS.items():
        for kind in ("weight", "bias") if ours.startswith("t_") else ("weight",):
            yield f"{ours}.{kind}", f"{BLOCK}.{block}.norm1.emb.{theirs}.{kind}"
    if not embedders_only:
        for ours, theirs in OUTSIDE.items():
            for kind in ("weight", "bias"):
                yield f"{ours}.{kind}", f"{theirs}.{kind}"
        yield from block_names(block)


def block_names(block: int) -> Iterator[tuple[str, str]]:
    """Our name and diffusers' for what belongs to one block alone."""
    for ours, theirs in IN_BLOCK.items():
        for kind in ("weight", "bias"):
            yield f"blocks.{block}.{ours}.{kind}", f"{BLOCK}.{block}.{theirs}.{kind}"


def read_scheduler(where: Path) -> tuple[NoiseProcess, Sampling, list[str]]:
    """Noise process and sampling of a scheduler's config; DiT's own where the folder has none."""
    if not where.is_file():
        return NoiseProcess(), Sampling(), ["no scheduler in the folder: DiT's 1000 linear betas were assumed"]
    values, notes = read_json(where), []
    for key, default, wanted in (("beta_schedule", "linear", "linear"), ("prediction_type", "epsilon", "epsilon"),
                                 ("trained_betas", None, None), ("rescale_betas_zero_snr", False, False)):
        if values.get(key, default) != wanted:
            raise FormatError(f"{where}: {key} is {values[key]!r}; slimdit knows {wanted!r} only", 3)
    steps = values.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= LARGEST_SIDE:
        raise FormatError(f"{where}: num_train_timesteps must be a whole number above 0, not {steps!r}")
    betas = [values.get("beta_start", 1e-4), values.get("beta_end", 0.02)]
    if not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas):
        raise FormatError(f"{where}: beta_start and beta_end must be numbers in 0..1, not {betas}")
    solver = SOLVER_OF.get(str(values.get("_class_name")))
    if solver is None:
        solver = "ddim"
        notes.append(f"{values.get('_class_name')} is no solver of slimdit's: ddim was taken instead")
    spacing = values.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise FormatError(f"{where}: timestep_spacing is {spacing!r}; slimdit knows {', '.join(SPACINGS)}")
    if values.get("steps_offset"):
        notes.append(f"steps_offset {values['steps_offset']} was left aside: slimdit's {spacing} spacing starts at 0")
    return NoiseProcess(steps, *betas), Sampling(solver=solver, spacing=spacing, steps=min(50, steps)), notes


def find_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder of a folder: its `vae/`, else pixels."""
    return KLAutoencoder(str((path / "vae").resolve())) if (path / "vae" / "config.json").is_file() else PixelSpace()


def restore(path: Path, tensors: dict[str, Tensor]) -> Loaded:
    """The pipeline that `save` wrote, with its own timestep embedder in place of the refitted one."""
    where = path / "slimdit.json"
    values = read_json(where)
    options = pipeline_options(values, where, also={"weights", "model", "notes"})
    config = model_config(values.get("model"), where)
    if config.frequency_shift != DIFFUSERS_SHIFT:
        kept = path / "slimdit.safetensors"
        own = read_safetensors(kept)
        check_tensors(own, kept)
        if set(own) != {name for name in tensors if name.startswith("t_embedder.")}:
            raise FormatError(f"{kept} should hold the timestep embedder and nothing else: save the model again")
        tensors = {**tensors, **own}
    if (path / "vae").is_dir() and isinstance(options["autoencoder"], KLAutoencoder):
        options["autoencoder"] = find_autoencoder(path)  # wherever the folder has moved since
    return Loaded(Pipeline(build_model(config, tensors, where), **options))


def save(pipeline: Pipeline, folder: Path) -> None:
    """Write a folder that plain diffusers loads: `transformer/`, `scheduler/`, and `vae/` where there is one at hand.

    `DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")` always works; with an autoencoder,
    `DiTPipeline.from_pretrained(folder)` does too. `README.md` in the folder says how equal the outputs are.

    Raises:
        FormatError: diffusers' DiT cannot be this model (exit code 3), or the folder holds other files.
    """
    require_plain(pipeline)
    config, tensors = pipeline.model.config, pipeline.model.state_dict()
    tensors = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    found = refitted(pipeline, tensors)
    with writing_folder(folder) as beside:
        written = {**tensors, **({f"t_embedder.{name}": tensor for name, tensor in found.embedder.state_dict().items()}
                                 if found else {})}
        weights = beside / "transformer" / f"{WEIGHTS}.safetensors"
        write_tensors(weights, to_diffusers(written, config), {"format": "pt"})
        write_json(beside / "transformer" / "config.json", transformer_config(config))
        write_json(beside / "scheduler" / "scheduler_config.json", scheduler_config(pipeline))
        notes = explain(pipeline, found)
        if not save_autoencoder(pipeline.autoencoder, beside):
            notes.append("There is no `vae/`: `DiTTransformer2DModel` loads this folder, `DiTPipeline` does not.")
        if found:
            write_tensors(beside / "slimdit.safetensors",
                          {name: tensor for name, tensor in tensors.items() if name.startswith("t_embedder.")})
        write_json(beside / "slimdit.json", {"weights": digest([weights]), "model": config.to_dict(),
                                             **pipeline_values(pipeline), "notes": notes})
        write_text(beside / "README.md", readme(pipeline, notes))


def require_plain(pipeline: Pipeline) -> None:
    """Refuse what diffusers' DiTTransformer2DModel cannot be, with what to do instead."""
    config = pipeline.model.config
    instead = 'save it with format="native"'
    if config.input_size[0] != config.input_size[1]:
        raise FormatError(f"diffusers' DiT is square, this model sees {config.input_size}: {instead}", 3)
    if any(block != config.blocks[0] for block in config.blocks):
        raise FormatError(f"the blocks of diffusers' DiT are all alike, this model's differ: {instead}", 3)
    if config.linears:
        name, kind = next(iter(config.linears.items()))
        raise FormatError(f"diffusers' DiT has float linear layers, {name} is {kind}: {instead}", 3)
    block = config.blocks[0]
    if block.attention != "softmax":
        raise FormatError(f"diffusers' DiT has softmax attention, this model's is {block.attention}: {instead}", 3)
    if block.experts:
        raise FormatError(f"diffusers' DiT has one MLP in a block, this model {block.experts.count} experts: {instead}",
                          3)
    if block.kv_heads or block.conv:
        has = "heads that share keys and values" if block.kv_heads else "a convolution of the values"
        raise FormatError(f"diffusers' DiT has plain softmax attention, this model's has {has}: {instead}", 3)
    if block.heads * block.head_dim != config.width or block.mlp_width != 4 * config.width:
        inner = block.heads * block.head_dim
        raise FormatError(f"diffusers' DiT has attention as wide as its tokens and an MLP of four times that, this "
                          f"model {inner} and {block.mlp_width} at width {config.width}: {instead}", 3)
    if block.adaln_rank or config.final_adaln_rank:
        raise FormatError("diffusers' DiT has one linear layer in adaLN, this model a pair of rank "
                          f"{block.adaln_rank or config.final_adaln_rank}: {instead}", 3)
    if config.label_rows < 2:
        raise FormatError(f"diffusers' DiT has two label rows at least, this model one: {instead}", 3)


def refitted(pipeline: Pipeline, tensors: Mapping[str, Tensor]) -> Refit | None:
    """The timestep embedder on diffusers' frequencies, or None where the model has those already."""
    config = pipeline.model.config
    if config.frequency_shift == DIFFUSERS_SHIFT:
        return None
    embedder = TimestepEmbedder(config.width, config.frequency_shift)
    embedder.load_state_dict({name.removeprefix("t_embedder."): tensor for name, tensor in tensors.items()
                              if name.startswith("t_embedder.")})
    return refit(embedder, timesteps(pipeline.process, pipeline.sampling), pipeline.process.steps)


def transformer_config(config: DiTConfig) -> dict[str, Any]:
    """diffusers' config for ours."""
    block = config.blocks[0]
    return {"_class_name": "DiTTransformer2DModel", "num_attention_heads": block.heads,
            "attention_head_dim": block.head_dim, "in_channels": config.channels, "out_channels": config.out_channels,
            "num_layers": len(config.blocks), "sample_size": config.input_size[0], "patch_size": config.patch,
            # diffusers always adds a row for the null class; without one, the last class stands in its place.
            "num_embeds_ada_norm": config.label_rows - 1, "activation_fn": "gelu-approximate", "attention_bias": True,
            "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": config.mlp_norm_eps,
            "dropout": 0.0, "norm_num_groups": 32, "upcast_attention": False}


def scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
    """A DDIMScheduler on the pipeline's process, with its spacing where diffusers has that too."""
    process, spacing = pipeline.process, pipeline.sampling.spacing
    return {"_class_name": "DDIMScheduler", "num_train_timesteps": process.steps, "beta_start": process.beta_start,
            "beta_end": process.beta_end, "beta_schedule": "linear", "trained_betas": None, "clip_sample": False,
            "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon", "thresholding": False,
            "timestep_spacing": spacing if spacing in SPACINGS else "trailing"}


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> bool:
    """Write `vae/` and `model_index.json` where the autoencoder is a local one; whether that was done."""
    if not isinstance(autoencoder, KLAutoencoder) or not Path(autoencoder.source).is_dir():
        return False
    vae = autoencoder.vae
    if vae.config.scaling_factor != autoencoder.scale:
        vae.register_to_config(scaling_factor=autoencoder.scale)
    vae.save_pretrained(folder / "vae")
    parts = {"transformer": CLASSES[0], "scheduler": "DDIMScheduler", "vae": "AutoencoderKL"}
    write_json(folder / "model_index.json",
               {"_class_name": "DiTPipeline", **{part: ["diffusers", name] for part, name in parts.items()}})
    return True


def explain(pipeline: Pipeline, found: Refit | None) -> list[str]:
    """What a user of plain diffusers should know of this folder."""
    config, notes = pipeline.model.config, []
    if found is None:
        notes.append("The weights are the model's own: plain diffusers gives its outputs at every timestep.")
    else:
        visited = len(timesteps(pipeline.process, pipeline.sampling))
        notes.append(
            f"diffusers spaces the timestep frequencies of a DiT differently from the original, so the two layers of "
            f"the timestep embedder were refitted to the {visited} timesteps of this model's schedule. The largest "
            f"deviation of the embedding (whose largest value is {found.size:.3g}) is {found.scheduled:.1e} at those "
            f"timesteps and {found.anywhere:.1e} at any of the {pipeline.process.steps}. slimdit itself reads the "
            f"original embedder from `slimdit.safetensors`.")
        if found.scheduled > UNEQUAL * found.size:
            notes.append(f"So plain diffusers does NOT give this model's outputs: {visited} timesteps are more than an "
                         f"embedder of width {config.width} can be refitted to. Save it with fewer steps.")
            log.warning("%s", notes[-1])
        elif found.anywhere > UNEQUAL * found.size:
            notes.append("Sample with exactly those timesteps in diffusers: between them the model is a different one. "
                         "For another number of steps, set it in slimdit and save again.")
    if pipeline.sampling.timesteps is not None or pipeline.sampling.spacing not in SPACINGS:
        chosen = timesteps(pipeline.process, pipeline.sampling)
        notes.append(f"diffusers has no name for this model's schedule; its timesteps are {chosen}.")
    if config.label_dropout == 0:
        notes.append("The model has no null class: sample without guidance (guidance_scale=1).")
    elif config.classes != 1000:
        notes.append(f"The null class is {config.classes}; diffusers' DiTPipeline takes 1000, so guide in a loop of "
                     f"your own, or with guidance_scale=1.")
    autoencoder = pipeline.autoencoder
    if isinstance(autoencoder, KLAutoencoder) and not Path(autoencoder.source).is_dir():
        notes.append(f"Latents are those of the autoencoder {autoencoder.source}, scale {autoencoder.scale}.")
    return notes


def readme(pipeline: Pipeline, notes: list[str]) -> str:
    """The folder's own page."""
    listed = "".join(f"- {note}\n" for note in notes)
    return (f"# {pipeline.name or 'A diffusion transformer'}\n\nSaved by slimdit for diffusers:\n\n```python\n"
            f"from diffusers import DiTTransformer2DModel\n\n"
            f'model = DiTTransformer2DModel.from_pretrained("this folder", subfolder="transformer")\n```\n\n{listed}')
