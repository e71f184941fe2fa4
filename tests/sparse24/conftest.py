import pytest
import torch


@pytest.fixture
def runtime_loops():
    """For kernels that loop over a range known at run time, which an old interpreter cannot with a new numpy."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton before 3.7 cannot run loops with bounds known at run time")


@pytest.fixture
def device():
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: on a busy machine several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
