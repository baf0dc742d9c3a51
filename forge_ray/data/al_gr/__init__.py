"""The files of FORGE's benchmark AL-GR, read into Parquet shards and written back exactly."""
