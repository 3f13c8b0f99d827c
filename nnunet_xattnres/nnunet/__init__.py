"""What this plugin needs of nnU-Net: its commands, datasets, plans and trainers."""
