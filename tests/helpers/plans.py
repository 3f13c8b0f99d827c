"""Plans as nnU-Net writes them, made by hand."""

ISOTROPIC = [[1, 1, 1]] + 5 * [[2, 2, 2]]


def planned(strides, patch_size, residual=False):
    """Plans as nnU-Net writes them, with one configuration, `full`."""
    n_stages, dim = len(strides), len(patch_size)
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": n_stages,
            "features_per_stage": [min(32 * 2**stage, 320) for stage in range(n_stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": n_stages * [dim * [3]],
            "strides": strides,
            blocks: list(range(1, n_stages + 1)),
            "n_conv_per_stage_decoder": list(range(1, n_stages)),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    full = {
        "data_identifier": "nnUNetPlans_full",
        "patch_size": patch_size,
        "batch_size": 9,
        "spacing": dim * [1.0],
        "architecture": architecture,
    }
    return {"plans_name": "nnUNetPlans", "configurations": {"full": full}}
