"""Swapped, forgotten and foreign arguments of every public function: one sentence that says what was expected."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_llama
from torch import nn

import lora_null
from lora_null import bayes, ops, peft

# What a user passes by mistake: nothing, a state dict, a number, a name, a list of batches, a class.
FOREIGN = [None, {}, 7, [torch.ones(2, 3)], nn.Linear]
TENSOR = torch.rand(4, 4)


# Each public function with its arguments in order; the value under trial takes the place of each in turn.
FUNCTIONS = {
    "calibrate": (lora_null.calibrate, ("model", "batches"), {}),
    "memory_plan": (lora_null.memory_plan, ("model", "batch"), {}),
    "text_batches": (lora_null.text_batches, ("tokenizer", "path"), {}),
    "initialize": (lora_null.initialize, ("model", "covariances", "config"), {"progress": False}),
    "load_adapter": (lora_null.load_adapter, ("model", "path"), {}),
    "save_adapter": (lora_null.save_adapter, ("adapted", "path"), {}),
    "merge": (lora_null.merge, ("adapted",), {}),
    "factorize": (lora_null.factorize, ("matrix", "matrix"), {}),
    "null_space": (lora_null.null_space, ("matrix",), {"r": 2}),
    "null_basis": (lora_null.null_basis, ("matrix",), {"energy": 0.1}),
    "evaluate": (lora_null.evaluate, ("adapted",), {"tokenizer": None}),
    "Covariances.load": (lora_null.Covariances.load, ("path",), {}),
    "covariance_update": (ops.covariance_update, ("matrix", "matrix"), {}),
    "symmetrize_": (ops.symmetrize_, ("matrix",), {}),
    "lora_linear": (ops.lora_linear, ("matrix",) * 4, {}),
    "lora_linear_and_projection": (ops.lora_linear_and_projection, ("matrix",) * 4, {}),
    "lora_up_linear": (ops.lora_up_linear, ("matrix",) * 4, {}),
    "initialize_lora_null_weights": (peft.initialize_lora_null_weights, ("peft", "covariances"), {}),
    "use_fused_kernels": (peft.use_fused_kernels, ("peft",), {}),
    "freeze_lora_A": (peft.freeze_lora_A, ("peft",), {}),
    "lora_layers": (peft.lora_layers, ("peft",), {}),
    "load_trainable": (peft.load_trainable, ("model", "path"), {}),
    "peft.save_adapter": (peft.save_adapter, ("peft", "path"), {}),
    "tfb": (bayes.tfb, ("adapted",), {"batches": []}),
    "laplace": (bayes.laplace, ("adapted",), {"batches": []}),
    "inducing": (bayes.inducing, ("adapted",), {}),
    "blob": (bayes.blob, ("adapted",), {}),
    "added_loss": (bayes.added_loss, ("adapted",), {"kl": 1.0}),
    "trainer_loss": (bayes.trainer_loss, ("adapted",), {"kl": 1.0}),
    "collect": (bayes.collect, ("adapted",), {}),
    "scores": (bayes.scores, ("matrix", "matrix"), {}),
    "calibration_error": (bayes.calibration_error, ("matrix", "matrix"), {}),
    "reliability": (bayes.reliability, ("matrix", "matrix"), {}),
}
# Their arguments are tried elsewhere, or they take none that could be of another type.
ELSEWHERE = {
    *("__version__", "bayes", "ops", "peft"),
    *("Covariances", "LoraNullConfig", "LoraNullLinear", "NullBasis", "NullSpace", "RetentionCallback"),  # classes
    *("Bin", "Scores", "Posterior", "FusedKernels", "FusedLoraLinear"),
    "null_spaces",  # solver/test_solver_many.py
    *("initialize_streaming", "own_text"),  # onepass/test_onepass.py, calibration/test_own_text.py
    *("covariance_update_reference", "lora_linear_reference", "lora_up_linear_reference"),  # definitions
    *("covariance_backend", "explain"),  # ops/test_dispatch.py
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """What the arguments should be; the functions are refused before they change any of it."""
    logging.disable(logging.WARNING)
    plain, adapted = make_llama(), make_llama()
    batches = [torch.arange(96).reshape(4, 24)] * 2
    covariances = lora_null.calibrate(plain, batches, progress=False)
    lora_null.initialize(adapted, covariances, lora_null.LoraNullConfig(r=4), progress=False)
    logging.disable(logging.NOTSET)
    return {
        "model": plain,
        "adapted": adapted,
        "peft": get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["q_proj"])),
        "batches": batches,
        "batch": batches[0],
        "covariances": covariances,
        "config": lora_null.LoraNullConfig(r=4),
        "path": tmp_path_factory.mktemp("paths") / "none",
        "matrix": TENSOR,
        "tokenizer": lambda text: {"input_ids": [1]},
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_foreign_arguments_are_refused_in_one_sentence(good, name):
    function, arguments, options = FUNCTIONS[name]
    for position, argument in enumerate(arguments):
        for foreign in FOREIGN:
            if argument == "config" and foreign is None:
                continue  # the default
            if argument == "batch" and foreign is not None and not isinstance(foreign, type):
                continue  # an empty batch, or one in a list
            if argument == "batches" and isinstance(foreign, type):
                continue  # a function that runs the model, as far as anyone can tell
            values = [good[kind] for kind in arguments]
            values[position] = foreign
            with pytest.raises((TypeError, ValueError)) as caught:
                function(*values, **options)
            text = str(caught.value)
            assert "expected" in text.lower() and "NoneType' object" not in text, (argument, foreign, text)


@pytest.mark.parametrize("name", [name for name, (_, arguments, _) in FUNCTIONS.items() if arguments[0] != "path"])
def test_swapped_arguments_are_refused_in_one_sentence(good, name):
    function, arguments, options = FUNCTIONS[name]
    if len(set(arguments)) < 2:
        pytest.skip("all of one type")
    with pytest.raises((TypeError, ValueError), match=r"(?i)expected.*order is"):
        function(*[good[kind] for kind in reversed(arguments)], **options)


# memory_plan is for models that hold none yet.
VALUED = [n for n, (_, kinds, _) in FUNCTIONS.items() if kinds[0] in ("model", "adapted") and n != "memory_plan"]


@pytest.mark.parametrize("name", VALUED)
def test_a_model_without_values_is_refused(good, name):
    function, arguments, options = FUNCTIONS[name]
    with torch.device("meta"):
        empty = make_llama()
    with pytest.raises(ValueError, match="on the device meta, which holds no values; expected a model with"):
        function(empty, *[good[kind] for kind in arguments[1:]], **options)


def test_every_public_function_is_tried():
    public = {name for module in (lora_null, ops, peft, bayes) for name in module.__all__}
    assert public - {name.split(".")[-1] for name in FUNCTIONS} == ELSEWHERE
