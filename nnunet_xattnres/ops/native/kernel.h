/* Forward and backward pass of one call, for one type REAL and one instruction set. Included once per type.

   One row of target voxels is computed at a time, so that what it needs stays in the cache. Channels are the innermost
   axis of every buffer, so that every inner loop is contiguous.

   A candidate is interpolated along z and y into one coarse row u_0 .. u_(n-1). Along x, v(x) = (1 - w) u_lo + w u_hi is
   never formed. What is needed follows from products of the u_i, which have a fraction of the voxels:

       < q , v(x) >  = (1 - w) < q , u_lo > + w < q , u_hi >
       |v(x)|^2      = (1 - w)^2 |u_lo|^2 + 2 w (1 - w) < u_lo , u_hi > + w^2 |u_hi|^2
       out(x)        = sum_k a_k (1 - w) u_lo + a_k w u_hi

   The backward pass, with g = dout, r_k = (|v_k|^2 / C + eps)^(-1/2), e_k = r_k < q , v_k >, d_k = < g , v_k >,
   b_k = a_k (d_k - sum_j a_j d_j) r_k, n_k = b_k e_k r_k / C and the weights W of the interpolation along x:

       dv_k  = a_k g + b_k q - n_k v_k
       du_i  = sum_x W[x, i] dv_k(x)
             = sum_x W[x, i] a_k(x) g(x) + (sum_x W[x, i] b_k(x)) q - sum_j (sum_x W[x, i] W[x, j] n_k(x)) u_j
       dq    = sum_k sum_x b_k(x) v_k(x) = sum_k sum_i (sum_x W[x, i] b_k(x)) u_i

   The target is cut into blocks of rows along its longer axis of z and y, by its shape alone. A block writes the
   gradients of the coarse rows that begin in it. What it adds to rows of other blocks goes to its halo, and the halos
   are added in the order of the blocks. So the result has the same bits for any number of threads. */

#define LANES (VECTOR_BYTES / (int)sizeof(REAL))
#define PANEL 32 /* channels that are held in registers */
#define VECTORS (PANEL / LANES)

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define VECTOR NAME(vector)
typedef REAL NAME(quad) __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
#define QUAD NAME(quad)
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef INTEGER NAME(mask) __attribute__((vector_size(4 * sizeof(REAL))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (NAME(mask)){__VA_ARGS__})
#endif
#define AT(pointer, v) (((const VECTOR *)(pointer))[v])

/* Linear interpolation along x: target voxel x lies between low and low + 1, with the weight `high` for the latter. */
typedef struct {
    int64_t factor[3];
    const int32_t *low;
    const REAL *high;
    int64_t coarse_offset; /* of the candidate's coarse voxels in a tile, in voxels */
    int64_t halo_offset;   /* of the candidate's halo among those of a block, in elements */
    int64_t halo_before;   /* coarse rows of the halo before those of the block. There is one after them */
    int64_t halo_row;      /* elements of one row of the halo */
} NAME(interpolation);

typedef struct {
    const call *call;
    NAME(interpolation) * interpolations;
    int32_t *low;
    REAL *high;
    int64_t cut;         /* the axis that is cut into blocks: 0 is z, 1 is y */
    int64_t block_rows;
    int64_t blocks;      /* per batch item */
    int64_t tile;        /* target voxels of a row that are computed at once */
    int64_t coarse_tile; /* coarse voxels of all candidates in a tile */
    int64_t halo;        /* elements of the halos of one block */
    int64_t items;       /* batch items whose gradients are computed at once, and which have halos */
    REAL *halos;
    double *query_gradients; /* of every block */
    int64_t next;        /* the next block that a thread takes */
    int64_t end;         /* where it finds no more */
    int64_t missing;     /* bytes that a thread could not allocate */
} NAME(job);

/* The buffers of one thread. K: candidates, X: voxels of a tile, N: coarse voxels of all candidates, C: channels. */
typedef struct {
    const REAL **rows; /* K: u of every candidate, from the first coarse voxel of the tile on */
    REAL *row_buffer;  /* N * C: those rows that are not read in place */
    REAL *squares;     /* N: |u_i|^2. Backward: then sum_x W[x, i]^2 n_k(x) */
    REAL *products;    /* N: < q , u_i >. Backward: then sum_x W[x, i] b_k(x) */
    REAL *neighbours;  /* N: < u_i , u_(i+1) >. Backward: then sum_x W[x, i] W[x, i+1] n_k(x) */
    REAL *weights;     /* K * X: a_k */
    REAL *scores;      /* K * X: e_k. Backward: then n_k */
    REAL *inverse_rms; /* K * X: r_k. Backward: then b_k */
    REAL *low_weights; /* K * X: a_k (1 - w) */
    REAL *high_weights; /* K * X: a_k w */
    REAL *mixture;     /* X * C: the output, or its gradient g */
    REAL *row_gradient; /* (X + 2) * C: du */
    REAL *value_gradients; /* K * X: d_k */
    REAL *query_gradient;  /* C */
    void *memory;
} NAME(scratch);

/* A tile: target voxels first .. end - 1 of the row (z, y) of a batch item. */
typedef struct {
    int64_t item, z, y, first, end;
} NAME(tile);

static inline int64_t NAME(minimum)(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t NAME(maximum)(int64_t a, int64_t b) { return a > b ? a : b; }

/* The first target voxel whose lower neighbour is coarse voxel i. */
static inline int64_t NAME(first_target)(int64_t i, int64_t factor, int64_t extent, int64_t target) {
    return i <= 0 ? 0 : i >= extent ? target : i * factor + factor / 2;
}

static inline void NAME(neighbours_of)(int64_t target, int64_t factor, int64_t extent, int64_t *low, int64_t *high,
                                       REAL *high_weight) {
    int64_t halves = NAME(maximum)(2 * target + 1 - factor, 0);
    *low = halves / (2 * factor);
    *high = NAME(minimum)(*low + 1, extent - 1);
    *high_weight = (REAL)(halves - *low * 2 * factor) / (REAL)(2 * factor);
}

static inline int NAME(is_resized)(const int64_t *factor) { return factor[0] * factor[1] * factor[2] > 1; }

/* The most coarse voxels that a tile can have: (tile - 1) / factor, rounded up, and one more are lower neighbours of its
   target voxels. Then there is the upper neighbour of the last one. */
static inline int64_t NAME(most_coarse_voxels)(int64_t tile, int64_t factor) {
    return (tile + factor - 2) / factor + 2;
}

/* The coarse voxels of a tile: first .. first + count - 1. */
static inline void NAME(coarse_range)(const NAME(interpolation) * along, int64_t extent, const NAME(tile) * tile,
                                      int64_t *first, int64_t *count) {
    int64_t last = along->low[tile->end - 1] + (along->factor[2] > 1);
    *first = along->low[tile->first];
    *count = NAME(minimum)(last, extent - 1) - *first + 1;
}

static inline int64_t NAME(row_offset)(const candidate *of, int64_t batch, int64_t channels, int64_t item, int64_t z,
                                       int64_t y) {
    const int64_t cell = z % of->cells[0] * of->cells[1] + y % of->cells[1];
    const int64_t rows = of->size[0] / of->cells[0], columns = of->size[1] / of->cells[1];
    return (((cell * batch + item) * rows + z / of->cells[0]) * columns + y / of->cells[1]) * of->size[2] * channels;
}

static inline REAL NAME(dot)(const REAL *restrict a, const REAL *restrict b, int64_t channels) {
    REAL sum = 0;
    for (int64_t c = 0; c < channels; c++) sum += a[c] * b[c];
    return sum;
}

/* to[column * to_stride + row] = from[row * from_stride + column], four by four. */
static void NAME(transpose)(const REAL *restrict from, int64_t from_stride, REAL *restrict to, int64_t to_stride,
                            int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    for (int64_t row = 0; row < whole_rows; row += 4)
        for (int64_t column = 0; column < whole_columns; column += 4) {
            const REAL *source = from + row * from_stride + column;
            const QUAD a = *(const QUAD *)source, b = *(const QUAD *)(source + from_stride);
            const QUAD c = *(const QUAD *)(source + 2 * from_stride), d = *(const QUAD *)(source + 3 * from_stride);
            const QUAD low_ac = SHUFFLE(a, c, 0, 4, 1, 5), high_ac = SHUFFLE(a, c, 2, 6, 3, 7);
            const QUAD low_bd = SHUFFLE(b, d, 0, 4, 1, 5), high_bd = SHUFFLE(b, d, 2, 6, 3, 7);
            REAL *target = to + column * to_stride + row;
            *(QUAD *)target = SHUFFLE(low_ac, low_bd, 0, 4, 1, 5);
            *(QUAD *)(target + to_stride) = SHUFFLE(low_ac, low_bd, 2, 6, 3, 7);
            *(QUAD *)(target + 2 * to_stride) = SHUFFLE(high_ac, high_bd, 0, 4, 1, 5);
            *(QUAD *)(target + 3 * to_stride) = SHUFFLE(high_ac, high_bd, 2, 6, 3, 7);
        }
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; column++)
            to[column * to_stride + row] = from[row * from_stride + column];
}

/* Interpolate every candidate along z and y, and take the products of its coarse voxels. */
static void NAME(load)(const NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile) {
    const call *call = job->call;
    const int64_t channels = call->channels, voxels = tile->end - tile->first;
    const REAL *query = call->query;
    for (int64_t k = 0; k < call->count; k++) {
        const candidate *from = &call->candidates[k];
        const NAME(interpolation) *along = &job->interpolations[k];
        REAL *buffer = scratch->row_buffer + along->coarse_offset * channels;
        int64_t first, count;
        NAME(coarse_range)(along, from->size[2], tile, &first, &count);
        if (from->channels_first) {
            int64_t stride = call->size[0] * call->size[1] * call->size[2];
            const REAL *values = (const REAL *)from->values + tile->item * channels * stride +
                                 (tile->z * call->size[1] + tile->y) * call->size[2] + tile->first;
            NAME(transpose)(values, stride, buffer, channels, channels, voxels);
            scratch->rows[k] = buffer;
        } else {
            const REAL *values = (const REAL *)from->values + first * channels;
            int64_t low_z, high_z, low_y, high_y;
            REAL z, y;
            NAME(neighbours_of)(tile->z, along->factor[0], from->size[0], &low_z, &high_z, &z);
            NAME(neighbours_of)(tile->y, along->factor[1], from->size[1], &low_y, &high_y, &y);
            const REAL *restrict a = values + NAME(row_offset)(from, call->batch, channels, tile->item, low_z, low_y);
            const REAL *restrict b = values + NAME(row_offset)(from, call->batch, channels, tile->item, low_z, high_y);
            const REAL *restrict c = values + NAME(row_offset)(from, call->batch, channels, tile->item, high_z, low_y);
            const REAL *restrict d = values + NAME(row_offset)(from, call->batch, channels, tile->item, high_z, high_y);
            REAL *restrict row = buffer;
            if (along->factor[0] > 1 && along->factor[1] > 1) {
                const REAL wa = (1 - z) * (1 - y), wb = (1 - z) * y, wc = z * (1 - y), wd = z * y;
                for (int64_t i = 0; i < count * channels; i++) row[i] = wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
            } else if (along->factor[0] > 1) {
                for (int64_t i = 0; i < count * channels; i++) row[i] = (1 - z) * a[i] + z * c[i];
            } else if (along->factor[1] > 1) {
                for (int64_t i = 0; i < count * channels; i++) row[i] = (1 - y) * a[i] + y * b[i];
            }
            scratch->rows[k] = along->factor[0] > 1 || along->factor[1] > 1 ? buffer : a;
        }
        const REAL *row = scratch->rows[k];
        REAL *squares = scratch->squares + along->coarse_offset, *products = scratch->products + along->coarse_offset;
        REAL *neighbours = scratch->neighbours + along->coarse_offset;
        for (int64_t i = 0; i < count; i++) {
            const REAL *u = row + i * channels;
            squares[i] = NAME(dot)(u, u, channels);
            products[i] = NAME(dot)(query, u, channels);
        }
        if (along->factor[2] > 1) {
            for (int64_t i = 0; i + 1 < count; i++)
                neighbours[i] = NAME(dot)(row + i * channels, row + (i + 1) * channels, channels);
            neighbours[count - 1] = squares[count - 1]; /* beyond the end, the last voxel is repeated */
        }
    }
}

/* Scores and weights of every target voxel. */
static void NAME(weigh)(const NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile) {
    const call *call = job->call;
    const int64_t voxels = tile->end - tile->first, count = call->count;
    const REAL eps = (REAL)call->eps, channels = (REAL)call->channels;
    for (int64_t k = 0; k < count; k++) {
        const NAME(interpolation) *along = &job->interpolations[k];
        const REAL *restrict squares = scratch->squares + along->coarse_offset;
        const REAL *restrict products = scratch->products + along->coarse_offset;
        const REAL *restrict neighbours = scratch->neighbours + along->coarse_offset;
        REAL *restrict scores = scratch->scores + k * job->tile, *restrict inverse_rms = scratch->inverse_rms + k * job->tile;
        if (along->factor[2] == 1) {
            for (int64_t x = 0; x < voxels; x++) {
                inverse_rms[x] = 1 / SQRT(squares[x] / channels + eps);
                scores[x] = products[x] * inverse_rms[x];
            }
            continue;
        }
        const int32_t *restrict low = along->low + tile->first;
        const REAL *restrict high_weight = along->high + tile->first;
        const int32_t first = low[0], last = (int32_t)call->candidates[k].size[2] - 1 - first;
        for (int64_t x = 0; x < voxels; x++) {
            const int32_t i = low[x] - first, j = i < last ? i + 1 : i;
            const REAL w = high_weight[x];
            const REAL between = (1 - w) * (1 - w) * squares[i] + 2 * w * (1 - w) * neighbours[i] + w * w * squares[j];
            /* Squares may be infinite where the features are not, and zero times that is NaN. Of two opposite voxels,
               the norm may be negative by rounding, or infinity minus infinity. NaN in the features is in the products. */
            const REAL square = w == 0 ? squares[i] : between >= 0 ? between : between < 0 ? 0 : INFINITY;
            inverse_rms[x] = 1 / SQRT(square / channels + eps);
            scores[x] = ((1 - w) * products[i] + w * products[j]) * inverse_rms[x];
        }
    }
    const REAL *restrict scores = scratch->scores;
    REAL *restrict weights = scratch->weights;
    REAL *restrict largest = scratch->low_weights, *restrict sums = scratch->high_weights;
    for (int64_t x = 0; x < voxels; x++) largest[x] = scores[x], sums[x] = 0;
    for (int64_t k = 1; k < count; k++)
        for (int64_t x = 0; x < voxels; x++) {
            const REAL score = scores[k * job->tile + x];
            largest[x] = score > largest[x] ? score : largest[x];
        }
    for (int64_t k = 0; k < count; k++)
        for (int64_t x = 0; x < voxels; x++) {
            const REAL weight = EXP(scores[k * job->tile + x] - largest[x]);
            weights[k * job->tile + x] = weight;
            sums[x] += weight;
        }
    for (int64_t x = 0; x < voxels; x++) sums[x] = 1 / sums[x];
    for (int64_t k = 0; k < count; k++)
        for (int64_t x = 0; x < voxels; x++) weights[k * job->tile + x] *= sums[x];
    for (int64_t k = 0; k < count; k++) {
        const REAL *restrict high_weight = job->interpolations[k].high + tile->first;
        const REAL *restrict weight = weights + k * job->tile;
        REAL *restrict low_weights = scratch->low_weights + k * job->tile;
        REAL *restrict high_weights = scratch->high_weights + k * job->tile;
        for (int64_t x = 0; x < voxels; x++) {
            low_weights[x] = weight[x] * (1 - high_weight[x]);
            high_weights[x] = weight[x] * high_weight[x];
        }
    }
}

/* The two coarse voxels around target voxel x of the tile. */
#define BOTH_NEIGHBOURS(k, x)                                                                          \
    const NAME(interpolation) *along = &job->interpolations[k];                                        \
    const int64_t i = along->low[tile->first + (x)] - along->low[tile->first];                         \
    const int64_t beyond = along->low[tile->first + (x)] + 1 >= call->candidates[k].size[2];           \
    const REAL *restrict low = scratch->rows[k] + i * channels, *restrict high = low + (beyond ? 0 : channels);

/* out = sum_k a_k v_k */
static void NAME(mix)(const NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile) {
    const call *call = job->call;
    const int64_t channels = call->channels, voxels = tile->end - tile->first, panels = channels / PANEL * PANEL;
    for (int64_t x = 0; x < voxels; x++) {
        REAL *restrict out = scratch->mixture + x * channels;
        for (int64_t c = 0; c < panels; c += PANEL) {
            VECTOR sum[VECTORS] = {0};
            for (int64_t k = 0; k < call->count; k++) {
                BOTH_NEIGHBOURS(k, x)
                const REAL low_weight = scratch->low_weights[k * job->tile + x];
                const REAL high_weight = scratch->high_weights[k * job->tile + x];
                if (along->factor[2] == 1)
                    for (int v = 0; v < VECTORS; v++) sum[v] += low_weight * AT(low + c, v);
                else
                    for (int v = 0; v < VECTORS; v++) sum[v] += low_weight * AT(low + c, v) + high_weight * AT(high + c, v);
            }
            for (int v = 0; v < VECTORS; v++) ((VECTOR *)(out + c))[v] = sum[v];
        }
        for (int64_t c = panels; c < channels; c++) out[c] = 0;
        for (int64_t k = 0; k < call->count && panels < channels; k++) {
            BOTH_NEIGHBOURS(k, x)
            const REAL low_weight = scratch->low_weights[k * job->tile + x];
            const REAL high_weight = scratch->high_weights[k * job->tile + x];
            if (along->factor[2] == 1)
                for (int64_t c = panels; c < channels; c++) out[c] += low_weight * low[c];
            else
                for (int64_t c = panels; c < channels; c++) out[c] += low_weight * low[c] + high_weight * high[c];
        }
    }
}

static inline REAL NAME(sum_of)(VECTOR vector) {
    REAL sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
    return sum;
}

/* b_k and n_k of every target voxel, from the row g in scratch->mixture. They replace r_k and e_k. */
static void NAME(differentiate_scores)(const NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile) {
    const call *call = job->call;
    const int64_t channels = call->channels, voxels = tile->end - tile->first, panels = channels / PANEL * PANEL;
    REAL *restrict mean = scratch->row_gradient;
    for (int64_t x = 0; x < voxels; x++) {
        const REAL *restrict g = scratch->mixture + x * channels;
        mean[x] = 0;
        for (int64_t k = 0; k < call->count; k++) {
            BOTH_NEIGHBOURS(k, x)
            const REAL w = along->high[tile->first + x];
            VECTOR sum = {0};
            REAL product = 0;
            if (along->factor[2] == 1) {
                for (int64_t c = 0; c < panels; c += LANES) sum += AT(g + c, 0) * AT(low + c, 0);
                for (int64_t c = panels; c < channels; c++) product += g[c] * low[c];
            } else {
                for (int64_t c = 0; c < panels; c += LANES)
                    sum += AT(g + c, 0) * ((1 - w) * AT(low + c, 0) + w * AT(high + c, 0));
                for (int64_t c = panels; c < channels; c++) product += g[c] * ((1 - w) * low[c] + w * high[c]);
            }
            product += NAME(sum_of)(sum);
            scratch->value_gradients[k * job->tile + x] = product; /* d_k */
            mean[x] += scratch->weights[k * job->tile + x] * product;
        }
    }
    for (int64_t k = 0; k < call->count; k++) {
        const REAL *restrict weights = scratch->weights + k * job->tile, *restrict d = scratch->value_gradients + k * job->tile;
        REAL *restrict scores = scratch->scores + k * job->tile, *restrict inverse_rms = scratch->inverse_rms + k * job->tile;
        for (int64_t x = 0; x < voxels; x++) {
            const REAL b = weights[x] * (d[x] - mean[x]) * inverse_rms[x];
            scores[x] = b * scores[x] * inverse_rms[x] / (REAL)channels;
            inverse_rms[x] = b;
        }
    }
}

/* The coarse rows that begin in a block: first .. end - 1 along the cut axis. */
static inline void NAME(own_rows)(const NAME(job) * job, int64_t k, int64_t block, int64_t *first, int64_t *end) {
    const int64_t factor = job->interpolations[k].factor[job->cut];
    const int64_t stop = NAME(minimum)((block + 1) * job->block_rows, job->call->size[job->cut]);
    *first = (block * job->block_rows + factor - 1) / factor;
    *end = (stop + factor - 1) / factor;
}

static inline REAL *NAME(halo_row)(const NAME(job) * job, int64_t k, int64_t item, int64_t block, int64_t row) {
    const NAME(interpolation) *along = &job->interpolations[k];
    return job->halos + (item % job->items * job->blocks + block) * job->halo + along->halo_offset + row * along->halo_row;
}

/* Where the gradient of a coarse row begins: in the tensor if the row begins in this block, else in the block's halo. */
static inline REAL *NAME(gradient_row)(const NAME(job) * job, int64_t k, int64_t item, int64_t block, int64_t z, int64_t y) {
    const call *call = job->call;
    const candidate *of = &call->candidates[k];
    const NAME(interpolation) *along = &job->interpolations[k];
    const int64_t at = job->cut ? y : z, beside = job->cut ? z : y;
    int64_t first, end;
    NAME(own_rows)(job, k, block, &first, &end);
    if (at >= first && at < end)
        return (REAL *)of->gradient + NAME(row_offset)(of, call->batch, call->channels, item, z, y);
    const int64_t row = along->halo_before + (at < first ? at - first : 0);
    return NAME(halo_row)(job, k, item, block, row) + beside * of->size[2] * call->channels;
}

/* The gradients of the candidates and of the query, from one tile. */
static void NAME(add_gradients)(const NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile, int64_t block) {
    const call *call = job->call;
    const int64_t channels = call->channels, panels = channels / PANEL * PANEL, voxels = tile->end - tile->first;
    const REAL *restrict query = call->query;
    REAL *restrict query_gradient = scratch->query_gradient;
    for (int64_t c = 0; c < channels; c++) query_gradient[c] = 0;
    for (int64_t k = 0; k < call->count; k++) {
        const candidate *from = &call->candidates[k];
        const NAME(interpolation) *along = &job->interpolations[k];
        const int64_t factor = along->factor[2], extent = from->size[2];
        const REAL *restrict high_weight = along->high + tile->first;
        const REAL *restrict b = scratch->inverse_rms + k * job->tile, *restrict n = scratch->scores + k * job->tile;
        const REAL *restrict low_weights = scratch->low_weights + k * job->tile;
        const REAL *restrict high_weights = scratch->high_weights + k * job->tile;
        /* Sums over the target voxels, per coarse voxel. */
        REAL *restrict of_query = scratch->products + along->coarse_offset;
        REAL *restrict of_self = scratch->squares + along->coarse_offset;
        REAL *restrict of_next = scratch->neighbours + along->coarse_offset;
        int64_t first, count;
        NAME(coarse_range)(along, extent, tile, &first, &count);
        for (int64_t i = 0; i < count; i++) of_query[i] = of_self[i] = of_next[i] = 0;
        for (int64_t x = 0; x < voxels; x++) {
            const int64_t i = along->low[tile->first + x] - first;
            const REAL w = high_weight[x];
            if (i + 1 < count && factor > 1) {
                of_query[i] += (1 - w) * b[x], of_query[i + 1] += w * b[x];
                of_self[i] += (1 - w) * (1 - w) * n[x], of_self[i + 1] += w * w * n[x];
                of_next[i] += (1 - w) * w * n[x];
            } else {
                of_query[i] += b[x], of_self[i] += n[x];
            }
        }
        const int in_place = !NAME(is_resized)(along->factor) && !from->channels_first;
        const int64_t offset = first * channels;
        REAL *gradient = scratch->row_gradient;
        if (in_place && from->gradient)
            gradient = NAME(gradient_row)(job, k, tile->item, block, tile->z, tile->y) + offset;
        for (int64_t i = 0; i < count; i++) {
            const REAL *u = scratch->rows[k] + i * channels;
            const REAL *before = i ? u - channels : u, *after = i + 1 < count ? u + channels : u;
            const REAL to_query = of_query[i], to_self = of_self[i], to_before = i ? of_next[i - 1] : 0, to_after = of_next[i];
            for (int64_t c = 0; c < channels; c++) query_gradient[c] += to_query * u[c];
            if (!from->gradient) continue;
            const int64_t absolute = first + i;
            const int64_t begin = NAME(maximum)(NAME(first_target)(absolute - 1, factor, extent, call->size[2]), tile->first);
            const int64_t middle = NAME(first_target)(absolute, factor, extent, call->size[2]);
            const int64_t end = NAME(minimum)(NAME(first_target)(absolute + 1, factor, extent, call->size[2]), tile->end);
            const int64_t begin_x = factor == 1 ? i : begin - tile->first, end_x = factor == 1 ? i + 1 : end - tile->first;
            const int64_t middle_x = factor == 1 ? i : middle - tile->first;
            const int is_last = absolute == extent - 1;
            REAL *to = gradient + i * channels; /* may be u itself */
            for (int64_t c = 0; c < panels; c += PANEL) {
                VECTOR sum[VECTORS];
                for (int v = 0; v < VECTORS; v++) sum[v] = to_query * AT(query + c, v) - to_self * AT(u + c, v);
                if (factor > 1)
                    for (int v = 0; v < VECTORS; v++) sum[v] -= to_before * AT(before + c, v) + to_after * AT(after + c, v);
                for (int64_t x = begin_x; x < end_x; x++) {
                    const REAL weight = x < middle_x ? high_weights[x] : low_weights[x] + (is_last ? high_weights[x] : 0);
                    const REAL *restrict g = scratch->mixture + x * channels + c;
                    for (int v = 0; v < VECTORS; v++) sum[v] += weight * AT(g, v);
                }
                for (int v = 0; v < VECTORS; v++) ((VECTOR *)(to + c))[v] = sum[v];
            }
            if (panels == channels) continue;
            for (int64_t c = panels; c < channels; c++) {
                to[c] = to_query * query[c] - to_self * u[c];
                if (factor > 1) to[c] -= to_before * before[c] + to_after * after[c];
            }
            for (int64_t x = begin_x; x < end_x; x++) {
                const REAL weight = x < middle_x ? high_weights[x] : low_weights[x] + (is_last ? high_weights[x] : 0);
                const REAL *restrict g = scratch->mixture + x * channels;
                for (int64_t c = panels; c < channels; c++) to[c] += weight * g[c];
            }
        }
        if (!from->gradient || in_place) continue;
        if (from->channels_first) {
            int64_t stride = call->size[0] * call->size[1] * call->size[2];
            REAL *values = (REAL *)from->gradient + tile->item * channels * stride +
                           (tile->z * call->size[1] + tile->y) * call->size[2] + tile->first;
            NAME(transpose)(gradient, channels, values, stride, voxels, channels);
            continue;
        }
        int64_t z[2], y[2];
        REAL weight_z[2], weight_y[2];
        NAME(neighbours_of)(tile->z, along->factor[0], from->size[0], &z[0], &z[1], &weight_z[1]);
        NAME(neighbours_of)(tile->y, along->factor[1], from->size[1], &y[0], &y[1], &weight_y[1]);
        weight_z[0] = 1 - weight_z[1], weight_y[0] = 1 - weight_y[1];
        for (int a = 0; a < (along->factor[0] > 1 ? 2 : 1); a++)
            for (int e = 0; e < (along->factor[1] > 1 ? 2 : 1); e++) {
                const REAL weight = weight_z[a] * weight_y[e];
                REAL *restrict to = NAME(gradient_row)(job, k, tile->item, block, z[a], y[e]) + offset;
                for (int64_t j = 0; j < count * channels; j++) to[j] += weight * gradient[j];
            }
    }
    double *total = job->query_gradients + (tile->item * job->blocks + block) * channels;
    for (int64_t c = 0; c < channels; c++) total[c] += query_gradient[c];
}

/* Set the gradients of resized candidates to zero in the rows of a block. */
static void NAME(clear_own_rows)(const NAME(job) * job, int64_t item, int64_t block) {
    const call *call = job->call;
    for (int64_t k = 0; k < call->count; k++) {
        const candidate *of = &call->candidates[k];
        if (!of->gradient || !NAME(is_resized)(job->interpolations[k].factor)) continue;
        int64_t first, end;
        NAME(own_rows)(job, k, block, &first, &end);
        const int64_t beside = of->size[1 - job->cut];
        for (int64_t at = first; at < end; at++)
            for (int64_t other = 0; other < beside; other++) {
                REAL *row = NAME(gradient_row)(job, k, item, block, job->cut ? other : at, job->cut ? at : other);
                memset(row, 0, sizeof(REAL) * (size_t)(of->size[2] * call->channels));
            }
    }
}

/* Add the halos of all other blocks to the rows of a block, in the order of the blocks. */
static void NAME(add_halos)(const NAME(job) * job, int64_t item, int64_t block) {
    const call *call = job->call;
    for (int64_t k = 0; k < call->count; k++) {
        const candidate *of = &call->candidates[k];
        const NAME(interpolation) *along = &job->interpolations[k];
        const int64_t factor = along->factor[job->cut], length = of->size[2] * call->channels;
        if (!of->gradient || factor == 1) continue;
        int64_t first, end;
        NAME(own_rows)(job, k, block, &first, &end);
        for (int64_t other = 0; other < job->blocks; other++) {
            int64_t other_first, other_end;
            NAME(own_rows)(job, k, other, &other_first, &other_end);
            for (int64_t row = 0; row <= along->halo_before; row++) {
                const int64_t at = row < along->halo_before ? other_first - along->halo_before + row : other_end;
                if (at < first || at >= end) continue;
                const REAL *halo = NAME(halo_row)(job, k, item, other, row);
                for (int64_t beside = 0; beside < of->size[1 - job->cut]; beside++) {
                    REAL *restrict to = NAME(gradient_row)(job, k, item, block, job->cut ? beside : at, job->cut ? at : beside);
                    const REAL *restrict add = halo + beside * length;
                    for (int64_t j = 0; j < length; j++) to[j] += add[j];
                }
            }
        }
    }
}

/* The interpolation of every candidate, the blocks and the tile. Returns 0, or the bytes that cannot be allocated. */
static int64_t NAME(prepare)(NAME(job) * job, const call *call, int is_backward) {
    const int64_t count = call->count, target = call->size[2], channels = call->channels;
    memset(job, 0, sizeof *job);
    job->call = call;
    job->interpolations = calloc((size_t)count, sizeof *job->interpolations);
    int32_t *low = malloc(sizeof *low * (size_t)(count * target));
    REAL *high = malloc(sizeof *high * (size_t)(count * target));
    job->low = low, job->high = high;
    if (!job->interpolations || !low || !high)
        return count * ((int64_t)sizeof *job->interpolations + target * (int64_t)(sizeof *low + sizeof *high));
    int64_t per_voxel = 0; /* coarse voxels per target voxel, times the target's extent */
    for (int64_t k = 0; k < count; k++) {
        NAME(interpolation) *along = &job->interpolations[k];
        const candidate *from = &call->candidates[k];
        for (int axis = 0; axis < 3; axis++) along->factor[axis] = call->size[axis] / from->size[axis];
        along->low = low + k * target, along->high = high + k * target;
        for (int64_t x = 0; x < target; x++) {
            int64_t lower, upper;
            NAME(neighbours_of)(x, along->factor[2], from->size[2], &lower, &upper, &high[k * target + x]);
            low[k * target + x] = (int32_t)lower;
        }
        per_voxel += from->size[2];
    }
    job->tile = NAME(maximum)(CACHE_BYTES / (int64_t)sizeof(REAL) * target / ((per_voxel + 2 * target) * channels), 8);
    job->tile = NAME(minimum)(job->tile, target);
    for (int64_t k = 0; k < count; k++) {
        job->interpolations[k].coarse_offset = job->coarse_tile;
        job->coarse_tile += NAME(most_coarse_voxels)(job->tile, job->interpolations[k].factor[2]) + GUARD;
    }
    job->cut = call->size[1] > call->size[0];
    const int64_t rows = call->size[job->cut];
    job->block_rows = (rows + BLOCKS - 1) / BLOCKS;
    job->block_rows = NAME(minimum)((job->block_rows + 3) / 4 * 4, rows);
    job->blocks = (rows + job->block_rows - 1) / job->block_rows;
    if (!is_backward) return 0;
    for (int64_t k = 0; k < count; k++) {
        NAME(interpolation) *along = &job->interpolations[k];
        const candidate *from = &call->candidates[k];
        if (!from->gradient || along->factor[job->cut] == 1) continue;
        along->halo_offset = job->halo;
        along->halo_before = job->block_rows % along->factor[job->cut] ? 2 : 1;
        along->halo_row = from->size[1 - job->cut] * from->size[2] * channels;
        job->halo += (along->halo_before + 1) * along->halo_row;
    }
    const int64_t halos = NAME(maximum)(job->blocks * job->halo, 1);
    /* Threads wait for each other after the items that are computed at once. Four blocks for each thread keep that short. */
    const int64_t for_all_threads = (4 * call->threads + job->blocks - 1) / job->blocks;
    job->items = NAME(maximum)(HALO_BYTES / (halos * (int64_t)sizeof(REAL)), for_all_threads);
    job->items = NAME(maximum)(NAME(minimum)(job->items, call->batch), 1);
    job->halos = calloc((size_t)(job->items * halos), sizeof(REAL));
    const int64_t query_gradients = call->batch * job->blocks * channels + 1;
    job->query_gradients = calloc((size_t)query_gradients, sizeof(double));
    if (job->halos && job->query_gradients) return 0;
    return job->items * halos * (int64_t)sizeof(REAL) + query_gradients * (int64_t)sizeof(double);
}

static void NAME(finish)(NAME(job) * job) {
    free(job->interpolations), free(job->low), free(job->high), free(job->halos), free(job->query_gradients);
}

/* The buffers of one thread, in one piece of memory. Returns 0, or the bytes that cannot be allocated. */
static int64_t NAME(allocate)(const NAME(job) * job, NAME(scratch) * scratch) {
    const int64_t channels = job->call->channels, voxels = job->tile, scores = job->call->count * voxels;
    const int64_t coarse = job->coarse_tile;
    struct {
        REAL **buffer;
        int64_t elements;
    } parts[] = {{&scratch->row_buffer, coarse * channels}, {&scratch->squares, coarse}, {&scratch->products, coarse},
                 {&scratch->neighbours, coarse}, {&scratch->weights, scores}, {&scratch->scores, scores},
                 {&scratch->inverse_rms, scores}, {&scratch->low_weights, scores}, {&scratch->high_weights, scores},
                 {&scratch->value_gradients, scores}, {&scratch->mixture, voxels * channels},
                 {&scratch->row_gradient, (voxels + 2) * channels}, {&scratch->query_gradient, channels}};
    const int64_t line = 64 / (int64_t)sizeof(REAL);
    int64_t total = 0;
    for (size_t part = 0; part < sizeof parts / sizeof *parts; part++)
        total += (parts[part].elements + GUARD + line - 1) / line * line;
    scratch->rows = malloc(sizeof *scratch->rows * (size_t)job->call->count);
    const int64_t bytes = (int64_t)sizeof(REAL) * (total + line);
    scratch->memory = malloc((size_t)bytes);
    if (!scratch->rows || !scratch->memory) return bytes;
    REAL *next = (REAL *)(((uintptr_t)scratch->memory + 63) / 64 * 64);
    for (size_t part = 0; part < sizeof parts / sizeof *parts; part++) {
        *parts[part].buffer = next;
        GUARD_MEMORY(next + parts[part].elements, sizeof(REAL) * GUARD);
        next += (parts[part].elements + GUARD + line - 1) / line * line;
    }
    for (int64_t k = 0; GUARD && k < job->call->count; k++) {
        const NAME(interpolation) *along = &job->interpolations[k];
        const int64_t end = along->coarse_offset + NAME(most_coarse_voxels)(voxels, along->factor[2]);
        GUARD_MEMORY(scratch->row_buffer + end * channels, sizeof(REAL) * (size_t)(GUARD * channels));
        GUARD_MEMORY(scratch->squares + end, sizeof(REAL) * GUARD);
        GUARD_MEMORY(scratch->products + end, sizeof(REAL) * GUARD);
        GUARD_MEMORY(scratch->neighbours + end, sizeof(REAL) * GUARD);
    }
    return 0;
}

/* Compute one tile of the row (z, y). */
static void NAME(forward_tile)(NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile, int64_t block) {
    (void)block;
    const call *call = job->call;
    const int64_t stride = call->size[0] * call->size[1] * call->size[2];
    REAL *output = (REAL *)call->output + tile->item * call->channels * stride +
                   (tile->z * call->size[1] + tile->y) * call->size[2] + tile->first;
    NAME(load)(job, scratch, tile);
    NAME(weigh)(job, scratch, tile);
    NAME(mix)(job, scratch, tile);
    NAME(transpose)(scratch->mixture, call->channels, output, stride, tile->end - tile->first, call->channels);
}

static void NAME(backward_tile)(NAME(job) * job, NAME(scratch) * scratch, const NAME(tile) * tile, int64_t block) {
    const call *call = job->call;
    const int64_t stride = call->size[0] * call->size[1] * call->size[2];
    const REAL *gradient = (const REAL *)call->gradient + tile->item * call->channels * stride +
                           (tile->z * call->size[1] + tile->y) * call->size[2] + tile->first;
    NAME(load)(job, scratch, tile);
    NAME(weigh)(job, scratch, tile);
    NAME(transpose)(gradient, stride, scratch->mixture, call->channels, call->channels, tile->end - tile->first);
    NAME(differentiate_scores)(job, scratch, tile);
    NAME(add_gradients)(job, scratch, tile, block);
}

/* What every thread runs: blocks, as long as there are any. */
static inline void NAME(work)(NAME(job) * job, int is_backward) {
    const call *call = job->call;
    NAME(scratch) scratch = {0};
    const int64_t missing = NAME(allocate)(job, &scratch);
    if (missing) {
        __atomic_store_n(&job->missing, missing, __ATOMIC_RELAXED);
    } else {
        int64_t number;
        while ((number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->end) {
            const int64_t item = number / job->blocks, block = number % job->blocks;
            int64_t begin[2] = {0, 0}, end[2] = {call->size[0], call->size[1]};
            begin[job->cut] = block * job->block_rows;
            end[job->cut] = NAME(minimum)(begin[job->cut] + job->block_rows, end[job->cut]);
            if (is_backward) NAME(clear_own_rows)(job, item, block);
            for (int64_t z = begin[0]; z < end[0]; z++)
                for (int64_t y = begin[1]; y < end[1]; y++)
                    for (int64_t x = 0; x < call->size[2]; x += job->tile) {
                        const NAME(tile) tile = {item, z, y, x, NAME(minimum)(x + job->tile, call->size[2])};
                        (is_backward ? NAME(backward_tile) : NAME(forward_tile))(job, &scratch, &tile, block);
                    }
        }
    }
    free(scratch.rows), free(scratch.memory);
}

static void NAME(work_forward)(void *job) { NAME(work)(job, 0); }
static void NAME(work_backward)(void *job) { NAME(work)(job, 1); }

static void NAME(work_on_halos)(void *argument) {
    NAME(job) *job = argument;
    int64_t number;
    while ((number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->end)
        NAME(add_halos)(job, number / job->blocks, number % job->blocks);
}

static int64_t NAME(forward)(const call *call) {
    NAME(job) job;
    int64_t missing = NAME(prepare)(&job, call, 0);
    if (!missing) {
        job.end = call->batch * job.blocks;
        run_in_parallel(call->threads, call->parallel, NAME(work_forward), &job);
        missing = job.missing;
    }
    NAME(finish)(&job);
    return missing;
}

static int64_t NAME(backward)(const call *call) {
    NAME(job) job;
    int64_t missing = NAME(prepare)(&job, call, 1);
    for (int64_t first = 0; !missing && first < call->batch; first += job.items) {
        if (first) memset(job.halos, 0, sizeof(REAL) * (size_t)(job.items * job.blocks * job.halo));
        job.end = NAME(minimum)(first + job.items, call->batch) * job.blocks;
        job.next = first * job.blocks;
        run_in_parallel(call->threads, call->parallel, NAME(work_backward), &job);
        missing = job.missing;
        job.next = first * job.blocks;
        if (!missing) run_in_parallel(call->threads, call->parallel, NAME(work_on_halos), &job);
    }
    if (!missing) {
        REAL *query_gradient = call->output;
        for (int64_t c = 0; c < call->channels; c++) {
            double sum = 0;
            for (int64_t block = 0; block < call->batch * job.blocks; block++)
                sum += job.query_gradients[block * call->channels + c];
            query_gradient[c] = (REAL)sum;
        }
    }
    NAME(finish)(&job);
    return missing;
}

typedef struct {
    const average *average;
    int64_t next; /* the next plane z of the output that a thread takes */
    int64_t missing;
} NAME(average_job);

static void NAME(work_on_average)(void *argument) {
    NAME(average_job) *job = argument;
    const average *call = job->average;
    const int64_t *size = call->size, *factor = call->factor;
    const int64_t columns = size[2] * factor[2], rows = size[1] * factor[1];
    const REAL share = (REAL)1 / (REAL)(factor[0] * factor[1] * factor[2]);
    const int64_t bytes = (int64_t)sizeof(REAL) * columns;
    REAL *restrict sums = malloc((size_t)bytes);
    if (!sums) {
        __atomic_store_n(&job->missing, bytes, __ATOMIC_RELAXED);
        return;
    }
    int64_t number;
    while ((number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < call->planes * size[0])
        for (int64_t y = 0; y < size[1]; y++) {
            REAL *restrict to = (REAL *)call->output + (number * size[1] + y) * size[2];
            for (int64_t row = 0; row < factor[0] * factor[1]; row++) {
                const int64_t z = number * factor[0] + row / factor[1];
                const REAL *restrict from =
                    (const REAL *)call->values + (z * rows + y * factor[1] + row % factor[1]) * columns;
                for (int64_t x = 0; x < columns; x++) sums[x] = row ? sums[x] + from[x] : from[x];
            }
            if (factor[2] == 2) /* the usual one, which a compiler vectorises */
                for (int64_t x = 0; x < size[2]; x++) to[x] = share * (sums[2 * x] + sums[2 * x + 1]);
            else
                for (int64_t x = 0; x < size[2]; x++) {
                    REAL sum = 0;
                    for (int64_t i = 0; i < factor[2]; i++) sum += sums[x * factor[2] + i];
                    to[x] = share * sum;
                }
        }
    free(sums);
}

static int64_t NAME(average)(const average *call) {
    NAME(average_job) job = {call, 0, 0};
    run_in_parallel(call->threads, call->parallel, NAME(work_on_average), &job);
    return job.missing;
}

#undef LANES
#undef PANEL
#undef VECTORS
#undef VECTOR
#undef QUAD
#undef SHUFFLE
#undef AT
#undef BOTH_NEIGHBOURS
