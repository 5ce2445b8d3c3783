CREATE TABLE public.files (
    id character varying NOT NULL,
    name character varying NOT NULL,
    content_type character varying NOT NULL,
    size integer NOT NULL,
    sha256 character varying NOT NULL,
    created_at character varying NOT NULL,
    expires_at character varying NOT NULL,
    about json
);
CREATE TABLE public.fronts (
    id character varying NOT NULL,
    beat integer NOT NULL
);
CREATE TABLE public.predictions (
    id character varying NOT NULL,
    owner character varying,
    created_at character varying NOT NULL,
    request json,
    input json NOT NULL,
    api character varying NOT NULL,
    model character varying NOT NULL,
    version character varying NOT NULL,
    base_url character varying NOT NULL,
    webhook text,
    webhook_events json NOT NULL,
    webhook_due boolean NOT NULL,
    cancel_requested boolean NOT NULL,
    deaths integer NOT NULL,
    status character varying NOT NULL,
    output json,
    error text,
    logs text NOT NULL,
    metrics json NOT NULL,
    started_at character varying,
    completed_at character varying
);
CREATE TABLE public.secrets (
    name character varying NOT NULL,
    value character varying NOT NULL
);
INSERT INTO public.files VALUES ('NG-0z0UuZRcSp9MeMTv4Wd3Qo3EIzYnN', 'photo.png', 'image/png', 5, '55c64d0fcd6f9d5f7c828093857e3fdfda68478bb4e9bd24d481ef391c7804e8', '2026-11-26T05:39:23.039531Z', '2126-11-02T05:39:23.042536Z', '{"metadata": {"of": "a fox"}}');
INSERT INTO public.files VALUES ('NONBECl3sP9WvRfNq3uvAwxnzB2qNsUn', 'output.webp', 'image/webp', 7, '2cea274d0bedc39ec4ab6ba9e59ec889e3ed6fb56a1cf088a64d9b383378dc97', '2026-11-26T05:39:23.184166Z', '2126-11-02T05:39:23.186090Z', NULL);
INSERT INTO public.files VALUES ('42wUsI_yMNkdB7CQP_wG5xjkVV5cxOyt', 'output.webp', 'image/webp', 7, '2cea274d0bedc39ec4ab6ba9e59ec889e3ed6fb56a1cf088a64d9b383378dc97', '2026-11-26T05:39:23.340278Z', '2126-11-02T05:39:23.342081Z', NULL);
INSERT INTO public.fronts VALUES ('front-before', 1);
INSERT INTO public.predictions VALUES ('cog-waiting', 'front-before', '2026-11-26T05:39:23.081622Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'starting', NULL, NULL, '', '{}', NULL, NULL);
INSERT INTO public.predictions VALUES ('cog-processing', 'front-before', '2026-11-26T05:39:23.102875Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, false, 1, 'processing', NULL, NULL, 'Using seed: 7
 50%|#####     | 2/4', '{"seed": 7}', '2026-11-26T05:39:23.121698Z', NULL);
INSERT INTO public.predictions VALUES ('cog-unwanted', 'front-before', '2026-11-26T05:39:23.147736Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, true, 0, 'starting', NULL, NULL, '', '{}', NULL, NULL);
INSERT INTO public.predictions VALUES ('cog-succeeded', 'front-before', '2026-11-26T05:39:23.173717Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'succeeded', '["/files/NONBECl3sP9WvRfNq3uvAwxnzB2qNsUn/output.webp"]', NULL, 'Using seed: 7
', '{"predict_time": 1.5, "timing": {"denoise": 1.2}}', '2026-11-26T05:39:23.186331Z', '2026-11-26T05:39:23.186415Z');
INSERT INTO public.predictions VALUES ('cog-failed', 'front-before', '2026-11-26T05:39:23.201004Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'failed', NULL, 'A mask needs an image.', '', '{"predict_time": 0.1}', '2026-11-26T05:39:23.212530Z', '2026-11-26T05:39:23.212564Z');
INSERT INTO public.predictions VALUES ('replicate-unwanted', 'front-before', '2026-11-26T05:39:23.312012Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, true, 0, 'starting', NULL, NULL, '', '{}', NULL, NULL);
INSERT INTO public.predictions VALUES ('cog-canceled', 'front-before', '2026-11-26T05:39:23.225895Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', NULL, '["start", "output", "logs", "completed"]', false, true, 0, 'canceled', NULL, NULL, '', '{}', NULL, '2026-11-26T05:39:23.245740Z');
INSERT INTO public.predictions VALUES ('cog-webhook-due', 'front-before', '2026-11-26T05:39:23.255642Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'cog', '', '', '', 'http://127.0.0.1:9/hook', '["completed"]', true, false, 0, 'succeeded', '[]', NULL, '', '{"predict_time": 0.5}', '2026-11-26T05:39:23.265690Z', '2026-11-26T05:39:23.265733Z');
INSERT INTO public.predictions VALUES ('replicate-waiting', 'front-before', '2026-11-26T05:39:23.272160Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'starting', NULL, NULL, '', '{}', NULL, NULL);
INSERT INTO public.predictions VALUES ('replicate-processing', 'front-before', '2026-11-26T05:39:23.283837Z', '{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}', '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, false, 1, 'processing', NULL, NULL, 'Using seed: 7
 50%|#####     | 2/4', '{"seed": 7}', '2026-11-26T05:39:23.292857Z', NULL);
INSERT INTO public.predictions VALUES ('replicate-succeeded', 'front-before', '2026-11-26T05:39:23.331630Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'succeeded', '["/files/42wUsI_yMNkdB7CQP_wG5xjkVV5cxOyt/output.webp"]', NULL, 'Using seed: 7
', '{"predict_time": 1.5, "timing": {"denoise": 1.2}}', '2026-11-26T05:39:23.342139Z', '2026-11-26T05:39:23.342146Z');
INSERT INTO public.predictions VALUES ('replicate-failed', 'front-before', '2026-11-26T05:39:23.356356Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, false, 0, 'failed', NULL, 'A mask needs an image.', '', '{"predict_time": 0.1}', '2026-11-26T05:39:23.364358Z', '2026-11-26T05:39:23.364398Z');
INSERT INTO public.predictions VALUES ('replicate-webhook-due', 'front-before', '2026-11-26T05:39:23.398747Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', 'http://127.0.0.1:9/hook', '["completed"]', true, false, 0, 'succeeded', '[]', NULL, '', '{"predict_time": 0.5}', '2026-11-26T05:39:23.413956Z', '2026-11-26T05:39:23.413999Z');
INSERT INTO public.predictions VALUES ('replicate-canceled', 'front-before', '2026-11-26T05:39:23.374868Z', NULL, '{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}', 'replicate', 'someone/some-model', '0000000000000000000000000000000000000000000000000000000000000000', 'http://127.0.0.1:8000', NULL, '["start", "output", "logs", "completed"]', false, true, 0, 'canceled', NULL, NULL, '', '{}', NULL, '2026-11-26T05:39:23.393685Z');
INSERT INTO public.secrets VALUES ('webhooks', 'qSrGjvF6YwOe4dRxcMO1D3e0DJs39LCt-IsMTUTpR_w');
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.fronts
    ADD CONSTRAINT fronts_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.predictions
    ADD CONSTRAINT predictions_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (name);
CREATE INDEX ix_files_expires_at ON public.files USING btree (expires_at);
CREATE INDEX ix_predictions_completed_at ON public.predictions USING btree (completed_at);
CREATE INDEX ix_predictions_created_at ON public.predictions USING btree (created_at);
CREATE INDEX ix_predictions_status ON public.predictions USING btree (status);
CREATE INDEX ix_predictions_webhook_due ON public.predictions USING btree (webhook_due);
