"""Networks, one file each with its frozen config and flavours. No model reads a file or knows the command line."""
