"""What a real pass keeps for its backward pass, for comparison with what is counted."""

import torch


def kept_for_backward(family, unet, inputs):
    """Bytes of distinct storages, other than weights, that a real forward pass keeps alive for its backward pass."""
    own, kept = {weight.data_ptr() for weight in unet.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = family.predict(unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
    assert output.requires_grad
    return sum(size for address, size in kept.items() if address not in own)
