"""What XAttnRes costs beside the planned network: the command `nnunet-xattnres overhead`."""
