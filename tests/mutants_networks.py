"""Mutants of teacher and student networks: see tests/mutants.py."""

NETWORKS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("teacher/flow.py", "flow"): [
        ("return eps - x0", "return x0 - eps", "sign of the velocity"),
        (
            "return shift * t / (1 + (shift - 1) * t)",
            "return t / (shift - (shift - 1) * t)",
            "shift and its inverse swapped",
        ),
        ("t / (shift - (shift - 1) * t)\n", "t / (shift + (shift - 1) * t)\n", "unshift with the wrong sign"),
        ("return xt - per_frame(t, xt) * v", "return xt - (1 - per_frame(t, xt)) * v", "x0 with eps's weight"),
        ("return xt + (1 - per_frame(t, xt)) * v", "return xt + per_frame(t, xt) * v", "eps with x0's weight"),
    ],
    ("teacher/guidance.py", "teacher"): [
        ('"none": 1 - guidance.text', '"none": -guidance.text', "guidance as c + s (c - u)"),
        ('"text": cond.drop(audio=True)', '"text": cond.drop(text=True)', "wrong middle branch"),
    ],
    ("teacher/rope.py", "cache teacher"): [
        (
            "positions + torch.tensor([frames, 0, 0]",
            "positions + torch.tensor([0, frames, 0]",
            "time moved along the rows",
        ),
    ],
    ("teacher/attention.py", "teacher cache attention"): [
        ("angles[-x.shape[1] :]", "angles[: x.shape[1]]", "queries at the places of the context"),
        (
            "    if all(kv.mask is None for kv in context):",
            "    if True:",
            "absent references are seen",
        ),
        ("spans[-1].stop == start:", "spans[-1].stop <= start:", "hidden blocks between two visible ones are seen"),
        (
            "keys = torch.cat([*(kv.k.to(k.dtype) for kv in context), k], 1)",
            "keys = torch.cat([*(kv.k.to(k.dtype).detach() for kv in context), k], 1)",
            "cached keys detached in the network",
        ),
        ("if mask is None and q.is_cuda", "if q.is_cuda", "flash-attn in spite of a mask"),
        (
            "return flash(q, k, v)",
            "return flash(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)",
            "flash-attn with heads before tokens",
        ),
        (" and q.dtype in (torch.bfloat16, torch.half)", "", "flash-attn in fp32"),
    ],
    ("teacher/attention.py", "attention"): [
        ("slice(0, self.free)] if self.free else []", "slice(0, 0)] if self.free else []", "references are not seen"),
        (
            "torch.cat([padding[..., span] for span in spans], -1)",
            "padding[..., : keys.shape[1]]",
            "padding of other keys",
        ),
    ],
    ("teacher/lora.py", "lora"): [
        (
            "nn.Parameter(down.new_zeros(layer.out_features, config.rank))",
            "nn.Parameter(down.new_ones(layer.out_features, config.rank))",
            "adapters have an effect at the start",
        ),
        ("self.scale = config.alpha / config.rank", "self.scale = config.alpha", "alpha without the rank"),
        (
            "return self.scale * self.up @ self.down",
            "return self.up @ self.down",
            "merged without the scale",
        ),
    ],
    ("teacher/adapted.py", "lora"): [
        ("self._hidden = (base,)", "self.inner, self._hidden = base, (base,)", "the base is part of each view"),
        (
            "twin = AdaptedDiT(self.base, self.lora)",
            "twin = AdaptedDiT(copy.deepcopy(self.base), self.lora)",
            "copies copy the base",
        ),
    ],
    ("teacher/blocks.py", "teacher"): [
        ("past + 1 - self.window :", "past + 2 - self.window :", "audio one frame late"),
    ],
    ("teacher/conditions.py", "teacher student"): [
        ("(stop + PAST))", "(stop + PAST + 1))", "a chunk hears one frame too many"),
    ],
    ("teacher/dit.py", "teacher self_forcing"): [
        ("told[index % 2]", "told[0]", "listen audio not heard"),
        ("(cond.text * cond.text_mask[..., None])", "(cond.text)", "masked words are read"),
        ("moved(base, time) for time in", "moved(base, 0 * time) for time in", "references all at one place"),
    ],
    ("teacher/sampler.py", "flow"): [
        ("if following > 0 else ahead", "if following > 2 else ahead", "Heun is Euler"),
    ],
    ("teacher/codec.py", "teacher"): [
        ("(z * self.scale) @ self.basis.T", "z @ self.basis.T", "decoder without scale"),
    ],
    ("student/mask.py", "cache student"): [
        ("column >= row - window", "column > row - window", "window one chunk short"),
        ("(column < row)", "(column <= row + 1)", "the next chunk is seen"),
        ("(column < sink)", "(column <= sink)", "sink one chunk too long"),
        (
            "Blocks(torch.cat([past, torch.eye(chunks, dtype=torch.bool)], 1)",
            "Blocks(torch.cat([past, torch.eye(chunks, dtype=torch.bool) | past], 1)",
            "the noisy past is seen beside the given history",
        ),
        (
            "Blocks(torch.cat([past, torch.eye",
            "Blocks(torch.cat([past | torch.eye(chunks, dtype=torch.bool), torch.eye",
            "a chunk sees its own clean end",
        ),
    ],
    ("student/kv_cache.py", "cache"): [
        ("[-self.window_chunks :]", "[-self.window_chunks - 1 :]", "window of the cache one chunk too long"),
        ("self.seen if self.absolute else len(self.visible)", "self.seen", "absolute positions"),
        ("moved(base, index * self.grid[0])", "moved(base, index * self.grid[0] + 1)", "RoPE offset of the history"),
        (
            "grid_positions(*self.grid), self.start)",
            "grid_positions(*self.grid), self.start + 1)",
            "RoPE offset of now",
        ),
        ("len(self.sink) < self.sink_chunks", "len(self.sink) <= self.sink_chunks", "sink of the cache too long"),
        (
            "        return replace(self, sink=sink, window=window, seen=self.seen + 1)",
            "        self.__dict__.setdefault('kept', []).append(chunk)\n"
            "        new = replace(self, sink=sink, window=window, seen=self.seen + 1)\n"
            "        new.__dict__['kept'] = self.__dict__['kept']\n"
            "        return new",
            "forgotten chunks stay in memory",
        ),
        (
            "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks else ()\n",
            "        window = (*self.window, chunk)[-self.window_chunks :] if self.window_chunks "
            "else ()\n"
            "        if self.window and window:\n"
            "            for (k, v), (new_k, new_v) in zip(self.window[0], chunk, strict=True):\n"
            "                k.data.copy_(new_k), v.data.copy_(new_v)\n"
            "            window = (*self.window[1:], self.window[0])\n",
            "rolling buffer written in place",
        ),
    ],
    ("student/causal_dit.py", "cache student"): [
        (
            "cache.push(self.dit.run(x, t, cond, cache.positions(), cache.context())[1])",
            "cache.push(self.dit.run(x, t, cond, cache.positions(), cache.refs)[1])",
            "chunks are remembered without their past",
        ),
        ("self.dit.run(hist, t_hist, cond", "self.dit.run(hist, t, cond", "history at the time of the noisy clip"),
        (
            "context = [[*ref, KV(k, v, positions)]",
            "context = [[*ref, KV(k.detach(), v.detach(), positions)]",
            "given history without gradient",
        ),
        (
            "grid = (self.stream.chunk_frames, rows, columns)",
            "grid = (self.stream.chunk_frames, columns, rows)",
            "transposed",
        ),
    ],
    ("teacher/draws.py", "engine"): [
        ("rank * count, count)", "0, count)", "every process draws the first process's rows"),
    ],
    ("teacher/naming.py", "weights"): [
        ('"d c p q -> d (p q c)"', '"d c p q -> d (q p c)"', "rows and columns of a patch swapped"),
        ("weight[:, :channels, 0]", "weight[:, -channels:, 0]", "the wrong channels of I2V kept"),
    ],
}
