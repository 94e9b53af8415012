"""Operations that know nothing of keepkv: rotary positions, ragged batches, least squares, repeatable chance, dtypes."""
