grouped:
	s_mov_b32 s6, 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_add_u32_e32 v46, s8, v45
	v_add_u32_e32 v47, s8, v44
	buffer_load_dwordx4 v[50:53], v46, s[24:27], 0 offen offset:256
	buffer_load_dwordx4 v[54:57], v47, s[24:27], 0 offen offset:256
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_read_b128 v[58:61], v36 offset:16384
	ds_read_b128 v[62:65], v38
	ds_read_b128 v[66:69], v38 offset:8192
	ds_read_b128 v[70:73], v37 offset:16384
	s_waitcnt lgkmcnt(2)
	v_mfma_f32_32x32x16_bf16 v[18:33], v[58:61], v[62:65], v[18:33]
	v_add_u32_e32 v48, s8, v43
	v_add_u32_e32 v49, 0x80000, v48
	s_addk_i32 s8, 0x100
	s_cmpk_lg_i32 s8, 0x1f00
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[58:61], v[66:69], v[2:17]
	ds_read_b128 v[58:61], v40
	ds_read_b128 v[62:65], v40 offset:8192
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[18:33], v[70:73], v[58:61], v[18:33]
	s_waitcnt lgkmcnt(0)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[70:73], v[62:65], v[2:17]
	ds_read_b128 v[58:61], v39 offset:16384
	ds_read_b128 v[62:65], v42
	ds_read_b128 v[66:69], v42 offset:8192
	ds_read_b128 v[70:73], v41 offset:16384
	s_waitcnt lgkmcnt(2)
	v_mfma_f32_32x32x16_bf16 v[18:33], v[58:61], v[62:65], v[18:33]
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[58:61], v[66:69], v[2:17]
	ds_read_b128 v[58:61], v0
	ds_read_b128 v[62:65], v0 offset:8192
	buffer_load_dwordx4 v[66:69], v48, s[4:7], 0 offen offset:256
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[18:33], v[70:73], v[58:61], v[18:33]
	buffer_load_dwordx4 v[58:61], v49, s[4:7], 0 offen offset:256
	s_waitcnt lgkmcnt(0)
	s_barrier
	buffer_load_dwordx4 v[74:77], v46, s[24:27], 0 offen offset:384
	buffer_load_dwordx4 v[78:81], v47, s[24:27], 0 offen offset:384
	s_waitcnt vmcnt(5)
	ds_write_b128 v35, v[50:53]
	s_waitcnt vmcnt(4)
	ds_write_b128 v35, v[54:57] offset:8192
	s_waitcnt vmcnt(3)
	ds_write_b128 v35, v[66:69] offset:16384
	s_waitcnt vmcnt(2)
	ds_write_b128 v35, v[58:61] offset:24576
	v_mfma_f32_32x32x16_bf16 v[2:17], v[70:73], v[62:65], v[2:17]
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_read_b128 v[50:53], v36 offset:16384
	ds_read_b128 v[54:57], v38
	ds_read_b128 v[58:61], v38 offset:8192
	ds_read_b128 v[62:65], v37 offset:16384
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[50:53], v[58:61], v[2:17]
	v_mfma_f32_32x32x16_bf16 v[18:33], v[50:53], v[54:57], v[18:33]
	ds_read_b128 v[50:53], v40
	ds_read_b128 v[54:57], v40 offset:8192
	s_waitcnt lgkmcnt(0)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[62:65], v[54:57], v[2:17]
	v_mfma_f32_32x32x16_bf16 v[18:33], v[62:65], v[50:53], v[18:33]
	ds_read_b128 v[50:53], v39 offset:16384
	ds_read_b128 v[54:57], v42
	ds_read_b128 v[58:61], v42 offset:8192
	ds_read_b128 v[62:65], v41 offset:16384
	s_waitcnt lgkmcnt(1)
	v_mfma_f32_32x32x16_bf16 v[2:17], v[50:53], v[58:61], v[2:17]
	buffer_load_dwordx4 v[58:61], v48, s[4:7], 0 offen offset:384
	s_nop 0
	buffer_load_dwordx4 v[46:49], v49, s[4:7], 0 offen offset:384
	v_mfma_f32_32x32x16_bf16 v[18:33], v[50:53], v[54:57], v[18:33]
	ds_read_b128 v[50:53], v0
	ds_read_b128 v[54:57], v0 offset:8192
	s_waitcnt lgkmcnt(0)
	s_barrier
	s_waitcnt vmcnt(3)
	ds_write_b128 v35, v[74:77]
	s_waitcnt vmcnt(2)
	ds_write_b128 v35, v[78:81] offset:8192
	s_waitcnt vmcnt(1)
	ds_write_b128 v35, v[58:61] offset:16384
	s_waitcnt vmcnt(0)
	ds_write_b128 v35, v[46:49] offset:24576
	v_mfma_f32_32x32x16_bf16 v[18:33], v[62:65], v[50:53], v[18:33]
	v_mfma_f32_32x32x16_bf16 v[2:17], v[62:65], v[54:57], v[2:17]
	s_cbranch_scc1 .LBB0_2
	s_endpgm
	.section	.rodata
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     84
    .vgpr_spill_count: 0
