"""The planned encoder/decoder with XAttnRes, at stage level and at block level."""
