"""Networks, one file each with its frozen config and flavours. No model reads a file."""
