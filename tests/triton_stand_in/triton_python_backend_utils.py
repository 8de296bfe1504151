"""What Triton's Python backend gives a model, without the server: enough to feed packaged models images.

The real server runs the same models in tests/packaging/test_triton_server.py.
"""


class Tensor:
    def __init__(self, name, array):  # type: ignore[no-untyped-def]
        self.name, self._array = name, array

    def as_numpy(self):  # type: ignore[no-untyped-def]
        return self._array


class TritonError(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors, error=None):  # type: ignore[no-untyped-def]
        self.output_tensors, self.error = output_tensors, error


def get_input_tensor_by_name(request, name):  # type: ignore[no-untyped-def]
    return Tensor(name, request[name])
