"""`llm average`: writes the mean of a run's last checkpoints as a model folder.

Averaging the weights along the path of a run removes some of the noise of its steps, as the decay of the learning rate
does (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization"). It is most useful
before the rate has fallen.
"""

import itertools
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.atomic import check_absent, output_directory
from llm.display import Display, tell
from llm.errors import DamagedCheckpoint, UserError
from llm.model.checkpoint import read_checksums, read_state, read_tokenizer
from llm.model.checkpoint_path import MODEL_FILE, STATE_FILE, last_checkpoints
from llm.model.checksums import Checksums
from llm.model.hf import to_hf
from llm.model.hf_folder import write_hf_files
from llm.model.tensor_files import open_tensors, write_tensors
from llm.model.transformer import parameter_count, parameter_shapes
from llm.training.saving import write_description


def average(
    run_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str] | None = None, *, last: int | None = None
) -> dict[str, Any]:
    """Writes the mean of the weights of a run's last checkpoints.

    The folder is a checkpoint without an optimizer's state: `llm eval`, `generate` and `export` read it, and
    `train.init_from` starts from it. Only one tensor at a time is in memory.

    Args:
        run_dir: the run's folder.
        out_dir: the folder to make; it is complete or not there. None: average-N in the run's folder.
        last: the number of checkpoints; None: checkpoint.keep_last, but at most DEFAULT_LAST.

    Returns out_dir, parameters and checkpoints (the averaged ones). Raises UserError for fewer checkpoints than `last`,
    a damaged one, and an out_dir that is not empty.
    """
    sources = last_checkpoints(Path(run_dir), last)
    states = [read_state(path) for path in sources]
    state, config = states[-1]
    if last is None and config.checkpoint.keep_last is not None:
        # An older one is there for another reason: it is the best, or a decay of the rate begins there.
        newest = slice(-config.checkpoint.keep_last, None)
        sources, states = sources[newest], states[newest]
    out_dir = Path(run_dir, f"average-{len(sources)}") if out_dir is None else Path(out_dir)
    check_absent(out_dir)
    for path, (other, its_config) in zip(sources, states, strict=True):
        # A folder that was copied here may belong to another run.
        if (other.data.dataset_hash, its_config.model) != (state.data.dataset_hash, config.model):
            raise UserError(f"{path}: is of another model or other data than {sources[-1].name}; move it elsewhere")
    shapes: dict[str, torch.Size] = {}
    for name, shape in parameter_shapes(config.model).items():
        # meta, because only the shapes are needed.
        shapes |= {
            key: part.shape for key, part in to_hf(config.model, name, torch.empty(shape, device="meta")).items()
        }
    with ExitStack() as stack:
        readers = [stack.enter_context(open_tensors(path, "model", sums=read_checksums(path))) for path in sources]

        done = itertools.count(1)

        def mean(name: str) -> Tensor:
            total = torch.zeros(shapes[name], dtype=torch.float32)
            for path, read in zip(sources, readers, strict=True):
                tensor = read(name)
                # Checked, because adding would broadcast another shape.
                if tensor.shape != total.shape:
                    raise DamagedCheckpoint(
                        f"{path}: model is of another shape: {name} is {list(tensor.shape)}, its config asks for "
                        f"{list(total.shape)}"
                    )
                total += tensor
            display.update(next(done), f"averaging {name}")
            return total / len(sources)

        with output_directory(out_dir, last=STATE_FILE) as made, Display("averaging", len(shapes)) as display:
            tokenizer = read_tokenizer(sources[-1])
            write_hf_files(made, config.model, tokenizer)
            tensors = write_tensors(made / MODEL_FILE, shapes, lambda name: (mean(name) for _ in range(1)))
            shutil.copymode(made / "config.json", made / MODEL_FILE)
            # The mean has no loss or loss scale.
            bare = replace(state, val_loss=None, loss_scaler=None, best_val_loss=None, worse_validations=0)
            write_description(made, config, bare, tokenizer, Checksums(tensors={"model": tensors}))
    names = [path.name for path in sources]
    tell(f"{out_dir}: the mean of {', '.join(names)}", sys.stderr)
    return {"out_dir": str(out_dir), "parameters": parameter_count(config.model), "checkpoints": names}
