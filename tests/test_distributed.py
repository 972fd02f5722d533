"""An optimized model under PyTorch's data parallelism."""

import copy

import pytest
import torch
from equivalence import assert_close
from torch import distributed, nn

import conjoin
from conjoin.layers.view import wides

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="no torch.distributed")


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 5))])

    def forward(self, x):
        x = self.stem(x).relu()
        return [head(x) for head in self.heads]


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel():
    """It registers each parameter at one module only, the wide layer's at the wide layer."""
    plain = Heads().double()
    model = conjoin.optimize(plain, (torch.randn(2, 6, dtype=torch.float64),))
    for each in (model, reference := copy.deepcopy(plain)):
        parallel = nn.parallel.DistributedDataParallel(each)
        optimizer = torch.optim.Adam(parallel.parameters(), 0.01)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = parallel(torch.randn(4, 6, dtype=torch.float64))
            sum(output.pow(2).sum() for output in outputs).backward()
            optimizer.step()
    assert len(wides(model)) == 1
    assert_close(model.state_dict(), reference.state_dict())
