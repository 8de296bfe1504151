"""Runs packaged Python models in a process that has nothing of vitdeploy: `run_models.py TASKS ANSWERS`.

TASKS is a pickle: a list of (the model's version folder, its requests as dictionaries of arrays). ANSWERS
gets a list per task: per request, its outputs by name, or the text of its error.
"""

import importlib.util
import pickle
import sys
from pathlib import Path


def run(folder, requests):  # type: ignore[no-untyped-def]
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("packaged_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    answers = model.execute(requests)
    sys.path.remove(folder)
    return [
        str(one.error) if one.error else {tensor.name: tensor.as_numpy() for tensor in one.output_tensors}
        for one in answers
    ]


if __name__ == "__main__":
    found = [run(*task) for task in pickle.loads(Path(sys.argv[1]).read_bytes())]
    assert "vitdeploy" not in sys.modules
    Path(sys.argv[2]).write_bytes(pickle.dumps(found))
