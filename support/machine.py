"""machine.py: the machine that a command runs on: device and number format, processes, signals, CPU tuning."""

import ctypes
import os
import signal
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

import checkpoints
import common
from common import UserError

# ---- device and seed -------------------------------------------------------------------------------------------


def pick_device(name):
    """The torch device. `auto`: the GPU if there is one, else Apple's, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """float32 or bfloat16. `auto`: bfloat16 where the processor multiplies it natively, GPU or CPU."""
    if name == "f32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = any("bf16" in feature and has for feature, has in torch.cpu.get_capabilities().items())
    return torch.bfloat16 if native else torch.float32


def seed_dropout(run, states):
    """Sets the generator that dropout draws from.

    states: the saved generator of each process. A process without a saved state gets a seed of its own, from --seed and
    its rank. The first one keeps the generator that --seed set.
    """
    if run.rank < len(states):
        checkpoints.generator_of(run.device).set_rng_state(states[run.rank])
    elif run.rank > 0:
        torch.manual_seed(int(np.random.SeedSequence((run.args.seed, run.rank)).generate_state(1)[0]))


# ---- processes and signals -------------------------------------------------------------------------------------


@contextmanager
def first_process_first():
    """The first process of a machine runs the block before the others: it makes the caches that they then read."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        common.all_reduce_sum([0])  # waits for the first process
    yield
    if first:
        common.all_reduce_sum([0])


@contextmanager
def interruptible():
    """Inside the block Ctrl-C and SIGTERM only set a flag, so that the step in progress ends and is saved.

    Yields a function that says whether the flag is set.
    """
    signals = []

    def remember(number, frame):
        signals.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: len(signals) > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error, kept="", advice="try a smaller --batch-size (with --accumulate), --size, --patch or --grid"):
    """The one line that says what ended a command; None for a fault of the program, which keeps its traceback.

    kept: what to say of the files that are there already.   advice: what to do where the memory does not suffice."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return text or f"interrupted{kept}"  # Ctrl-C itself says nothing
    if isinstance(error, OSError):
        if error.errno is None:
            return None
        return f"{error.filename or 'a file'}: {error.strerror}{kept}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"too little memory; {advice}"
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save, for example on a full disk
        return f"a file could not be written (is the disk full?){kept}"
    if dist.is_initialized() and ("gloo" in text or "Connection" in text or isinstance(error, dist.DistError)):
        return "another process of this run has ended"
    return None


def print_once(text):
    """Prints a line on stderr. Of several processes with the same line only one prints it."""
    if "RANK" in os.environ and not dist.is_initialized():
        if os.environ["RANK"] != "0":
            return
    elif dist.is_initialized():
        try:
            if dist.distributed_c10d._get_default_store().add(text, 1) > 1:
                return
        except RuntimeError:
            return  # the process that kept the store has ended, with a message of its own
    print(text, file=sys.stderr, flush=True)


# ---- CPU tuning and compilation --------------------------------------------------------------------------------
# OMP_WAIT_POLICY, how torch's threads wait for each other, stays at its default. "active" (awake) was 10 to 20% faster
# than "passive" (asleep) on an idle machine, and eight times slower beside one other busy process: see docs/speed.md.


def c_function(name):
    """A function of the C library on Linux; None elsewhere, or where the library lacks it, as musl does."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def keep_freed_memory():
    """Has the C library keep freed memory for the next step. By default glibc gives large blocks back to the system,
    and getting them again costs a page fault every 4 KiB: an eighth of LXMERT-base's step in bfloat16, or more."""
    mallopt = c_function("mallopt")
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: all blocks, the large ones too, are parts of the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose free end is never given back
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads; what one has freed another can take


def limit_compiled_products():
    """Bounds the memory of compiled matrix products where several processes share the machine (torchrun). In bfloat16
    oneDNN compiles one for each shape, and texts have many lengths. By default oneDNN keeps the last 1,024, and torch as
    many of each kind. With these limits each of four processes took 0.4 GB less, and was 2% slower. A process by itself would
    be 3 to 7% slower (tiny UNITER on scenes), so it has no limits. Call this before the first product."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "4")  # torch's own cache


def trim_memory():
    """Gives memory that is free now back to the system: after loading, which takes more than the steps need, and now and
    then in training. Batches differ in length, so gaps between the blocks in use add up: a small LXMERT with a teacher had
    10 GB after 700 steps."""
    trim = c_function("malloc_trim")
    if trim:
        trim(0)


def give_back_freed_memory():
    """Has the C library give large blocks back to the system when they are freed, for a server, which seldom needs much
    memory. By default glibc raises the size from which it does so, and each thread keeps what is smaller."""
    mallopt = c_function("mallopt")
    if mallopt:
        mallopt(-3, 2**22)  # M_MMAP_THRESHOLD: from 4 MiB on, and not raised later


def compile_layers(model):
    """Compiles the blocks that all layers of all three models are made of, where they stand: small regions, used many
    times, for any batch and lengths (`dynamic`), so that nothing is compiled again after the first steps."""
    torch._dynamo.config.recompile_limit = 64  # of one block: each width, number format and use of it counts
    torch.fx.experimental._config.use_duck_shape = False  # lengths that are equal at first need not stay so
    for module in model.modules():
        if isinstance(module, common.AttentionBlock | common.FeedForward):
            module.compile(dynamic=True)


def quantize_layers(model, device):
    """Dynamic quantisation (torch's own) of the linear maps in all layers, for inference on a CPU.

    Weights become 8-bit integers with a scale for each output. Inputs are rounded to 8 bits when they are multiplied, with a scale
    for each batch. Embeddings and heads keep float32. UserError where it cannot be done.
    """
    if device.type != "cpu":
        raise UserError("--int8 runs on a CPU only; add --device cpu")
    try:
        from torch.ao import quantization  # its authors announce that it will go
    except ImportError:
        raise UserError("--int8 takes torch.ao.quantization, which this version of torch no longer has") from None
    blocks = [m for m in model.modules() if isinstance(m, common.AttentionBlock | common.FeedForward)]
    with warnings.catch_warnings(action="ignore"):
        for block in blocks:
            spec = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
            quantization.quantize_dynamic(block, spec, inplace=True)


def is_quantized(model):
    """Whether `quantize_layers` has changed this model. Quantised layers compute no gradients."""
    return any(type(module).__module__.startswith("torch.ao.") for module in model.modules())
