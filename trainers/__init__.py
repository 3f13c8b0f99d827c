"""nnU-Net trainers of nnunet_xattnres: this is the folder that `nnUNet_extTrainer` names."""
